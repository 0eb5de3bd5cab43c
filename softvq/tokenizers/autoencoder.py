"""The tokenizer: images to latents and back, with the statistics that normalise the latents on board."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from softvq import hub
from softvq.config import flat, from_dict, to_dict
from softvq.errors import InputError
from softvq.randomness import fold_in
from softvq.tokenizers import released
from softvq.tokenizers.config import FREE_FIELDS, TokenizerConfig
from softvq.tokenizers.corruption import CorruptionConfig, noisy, patch_mask
from softvq.tokenizers.quantizers import build_quantizer, code_shape, innermost, unit_vectors
from softvq.tokenizers.vit import ViTDecoder, ViTEncoder, load_timm_weights

__all__ = ["ImageTokenizer", "TokenizerOutput"]

NO_CORRUPTION = CorruptionConfig()
PAINTERS = ("decoder.", "from_latents.", "head_channels")
"""Beginnings of the names of fields and weights that latents do not depend on."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerOutput:
    """What a training step needs."""

    images: Tensor
    """Reconstructions, `[batch, 3, height, width]`, not clamped."""
    latents: Tensor
    """Latents before normalisation, `[batch, token, dim]`."""
    losses: dict[str, Tensor]
    """The quantizer's own loss terms, already weighted."""
    masked: Tensor | None = None
    """Which patches were hidden from the encoder, `[batch, patch]`; nothing where none could be."""


class ImageTokenizer(nn.Module):
    """Images in [-1, 1] to L continuous latent tokens and back.

    `encode` gives latents normalised by `latent_mean` and `latent_std` (a pair a channel, buffers saved with the
    weights), and `decode` takes them; `encode_raw` and `decode_raw` do without. Images of any size that the patch
    divides encode to the same number of tokens.

    Args:
        config: The architecture.

    Examples:
        >>> from softvq.tokenizers.presets import preset
        >>> tokenizer = ImageTokenizer(preset("softvq-tiny-16", image_size=64))
        >>> latents = tokenizer.encode(torch.zeros(1, 3, 64, 96))
        >>> tuple(latents.shape), tuple(tokenizer.decode(latents, size=(64, 96)).shape)
        ((1, 16, 32), (1, 3, 64, 96))
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        sizes = {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_latent_tokens": config.num_latent_tokens,
        }
        self.encoder = ViTEncoder(config.encoder, **sizes)
        self.quantizer = build_quantizer(
            config.quantizer, num_latent_tokens=config.num_latent_tokens, latent_dim=config.latent_dim
        )
        self.to_latents = nn.Linear(config.encoder.width, self.quantizer.input_dim)
        self.from_latents = nn.Linear(config.latent_dim, config.decoder.width)
        if vectors := unit_vectors(config.quantizer):  # unit variance out, as the decoder's positions have
            nn.init.normal_(self.from_latents.weight, std=vectors**-0.5)
        self.decoder = ViTDecoder(config.decoder, **sizes, head_channels=config.head_channels)
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        keys: Int64[Tensor, " batch"] | None = None,
        *,
        corruption: CorruptionConfig = NO_CORRUPTION,
        num_tokens: int | None = None,
        softening: Tensor | float = 1.0,
    ) -> TokenizerOutput:
        """Reconstruct images for training: with the quantizer's loss terms, and whatever noise there is.

        Args:
            images: RGB in [-1, 1].
            keys: One for each image, from which all its noise is drawn; fresh ones by default.
            corruption: What to hide from encoder and decoder; nothing by default.
            num_tokens: Decode the first few tokens alone; all by default.
            softening: Multiplies the posterior's temperature, for a run that lowers it.

        Returns:
            Reconstructions, latents as the quantizer gave them, the quantizer's loss terms, and which patches were
            hidden. While the encoder is frozen the latents are those of use, and there are no terms.
        """
        if keys is None:
            keys = torch.randint(1 << 62, (len(images),), device=images.device)
        masked = None
        if corruption.mask_ratio[1] > 0:
            patches = (images.shape[2] // self.config.patch_size) * (images.shape[3] // self.config.patch_size)
            masked = patch_mask(fold_in(keys, 0), patches, corruption.mask_ratio)
        if self.encoder.latent_tokens.requires_grad:
            latents, losses = self.quantizer(self.encode_pre(images, masked), fold_in(keys, 1), softening)
        else:
            with torch.no_grad():
                latents, losses = self.quantizer.encode(self.encode_pre(images, masked)), {}
        decoded = noisy(latents, fold_in(keys, 2), corruption.latent_noise) if corruption.latent_noise > 0 else latents
        size = (images.shape[-2], images.shape[-1])
        return TokenizerOutput(
            images=self._decode(decoded[:, :num_tokens], size), latents=latents, losses=losses, masked=masked
        )

    def freeze_encoder(self) -> None:
        """Train the decoder alone from now on: encoder and quantizer stay as they are, and so do all latents."""
        for part in (self.encoder, self.to_latents, self.quantizer):
            part.requires_grad_(False)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch token dim"]:
        """Return normalised latents in float32.

        Args:
            images: RGB in [-1, 1]; height and width divisible by the patch.

        Returns:
            One row of `latent_dim` numbers for each latent token.

        Raises:
            InputError: If the height or width is not divisible by the patch.
        """
        return (self.encode_raw(images) - self.latent_mean) / self.latent_std

    def decode(
        self, latents: Float[Tensor, "batch token dim"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return images for normalised latents; values may lie a little outside [-1, 1].

        Args:
            latents: As `encode` gives them, or, if the config has `min_latent_tokens`, the first ones of those.
            size: Height and width in pixels, divisible by the patch; the config's `image_size` squared by default.

        Returns:
            RGB around [-1, 1].

        Raises:
            InputError: If the latents are not of this tokenizer's shape, or the size is not divisible by the patch.
        """
        self._check_latents(latents)
        return self.decode_raw(latents * self.latent_std + self.latent_mean, size)

    def encode_raw(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch token dim"]:
        """Return the latents as the quantizer gives them; otherwise like `encode`."""
        return self.quantizer.encode(self.encode_pre(images))

    def decode_raw(
        self, latents: Float[Tensor, "batch token dim"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return images for latents as the quantizer gives them; otherwise like `decode`."""
        self._check_latents(latents)
        size = size or (self.config.image_size, self.config.image_size)
        self._check_size(*size)
        return self._decode(latents, size)

    def encode_pre(
        self, images: Float[Tensor, "batch 3 height width"], masked: Bool[Tensor, "batch patch"] | None = None
    ) -> Float[Tensor, "batch token channel"]:
        """Return what the quantizer sees: the encoder's outputs after the linear layer to its input channels."""
        self._check_images(images)
        return self.to_latents(self.encoder(images.to(self.to_latents.weight.dtype), masked))

    def encode_indices(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch token *stage"]:
        """Return the likeliest codeword of every token.

        Args:
            images: RGB in [-1, 1]; height and width divisible by the patch.

        Returns:
            Indices into each token's own codebook. Product and residual quantizers have one for each part or depth, on
            axes after the token's, the outer wrapper's first.

        Raises:
            InputError: If the quantizer has no codebook.
        """
        return self._codebook().indices(self.encode_pre(images))

    def decode_indices(
        self, indices: Int[Tensor, "batch token *stage"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return images for the codewords themselves: what a hard quantizer decodes, and a soft one comes close to.

        Args:
            indices: As `encode_indices` gives them, or the first tokens of those where `decode` takes so few.
            size: Height and width in pixels; the config's `image_size` squared by default.

        Returns:
            RGB around [-1, 1].

        Raises:
            InputError: If the quantizer has no codebook, or the indices are not of its codewords.
        """
        quantizer, shape = self._codebook(), code_shape(self.config.quantizer)
        most, tokens = self.config.num_latent_tokens, indices.shape[1] if indices.ndim > 1 else 0
        if indices.is_floating_point():
            raise InputError(f"indices are {indices.dtype}, expected whole numbers, such as torch.int64")
        if tuple(indices.shape[2:]) != shape or not (self.config.min_latent_tokens or most) <= tokens <= most:
            expected = ", ".join(map(str, ("batch", most, *shape)))
            raise InputError(f"indices are {list(indices.shape)}, expected [{expected}]")
        codes = getattr(innermost(self.config.quantizer), "codebook_size", 0)
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < codes):
            raise InputError(f"indices are {int(indices.min())} to {int(indices.max())}, expected 0 to {codes - 1}")
        rest = indices.new_zeros(len(indices), most - tokens, *shape)  # which codebook is a token's depends on all
        return self.decode_raw(quantizer.lookup(torch.cat([indices, rest], dim=1).long())[:, :tokens], size)

    def top_codewords(
        self, images: Float[Tensor, "batch 3 height width"], k: int = 5
    ) -> tuple[Int[Tensor, "batch token *stage k"], Float[Tensor, "batch token *stage k"]]:
        """Return the k likeliest codewords of every token and their probabilities, largest first.

        Args:
            images: RGB in [-1, 1].
            k: 1 to the codebook's size.

        Returns:
            Indices and weights, on axes as `encode_indices` has them.

        Raises:
            InputError: If the quantizer has no codebook, or not so many codewords.
        """
        return self._codebook().top_codewords(self.encode_pre(images), k)

    @torch.no_grad()
    def statistics(self, images: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        """Return the codebook's health over a batch as scalars on the device, nothing where there is no codebook."""
        return self.quantizer.statistics(self.encode_pre(images))

    @torch.no_grad()
    def fit_statistics(
        self, batches: Iterable[Float[Tensor, "batch 3 height width"]], *, per_channel: bool = False
    ) -> None:
        """Set `latent_mean` and `latent_std` from images, in float64, so that `encode` gives mean 0 and deviation 1.

        Args:
            batches: At least one batch; a few hundred images are enough.
            per_channel: One pair for each latent channel instead of one pair for all.

        Raises:
            InputError: If there are no images, or the latents do not vary.
        """
        count, total, squares = 0, 0.0, 0.0
        for images in batches:
            latents = self.encode_raw(images.to(self.latent_mean.device)).flatten(0, 1).double()
            count += len(latents)
            total = total + latents.sum(dim=0)
            squares = squares + latents.square().sum(dim=0)
        if count == 0:
            raise InputError("no images were given to fit the latent statistics on")
        mean, power = torch.as_tensor(total) / count, torch.as_tensor(squares) / count
        if not per_channel:
            mean, power = mean.mean().expand_as(mean), power.mean().expand_as(power)
        std = (power - mean.square()).clamp(min=0).sqrt()
        if not bool(std.isfinite().all()):
            raise InputError("the latents of these images are not finite; the model cannot be used")
        if not bool((std > 0).all()):
            raise InputError("the latents of these images do not vary, so they cannot be normalised")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def load_backbones(self) -> list[str]:
        """Start encoder and decoder from the timm weights their configs name; return one sentence for each."""
        pairs = ((self.encoder, self.config.encoder), (self.decoder, self.config.decoder))
        return [load_timm_weights(vit, config.pretrained) for vit, config in pairs if config.pretrained]

    def fingerprint(self) -> str:
        """Return a SHA-256 over the config and every weight."""
        return hub.fingerprint(to_dict(self.config), self.state_dict())

    def latent_fingerprint(self) -> str:
        """Return a SHA-256 over what decides the latents: all but the decoder, which may learn on without them.

        Files of latents carry it, and so do generators.
        """
        config, tensors = flat(to_dict(self.config)), self.state_dict()
        return hub.fingerprint(
            {name: config[name] for name in config if not name.startswith(PAINTERS) and not name.endswith(FREE_FIELDS)},
            {name: tensors[name] for name in tensors if not name.startswith(PAINTERS)},
        )

    def save_pretrained(self, folder: Path | str, *, facts: Mapping[str, str] | None = None) -> None:
        """Write `config.json`, `model.safetensors` and a model card into `folder`.

        Args:
            folder: Made if need be; files in it of these names are replaced, but a card is left as it is.
            facts: For the card, see `softvq.hub.model_card`.

        Raises:
            RunError: If the files cannot be written; what was there before is untouched.
        """
        config = to_dict(self.config)
        hub.save_folder(folder, kind="tokenizer", config=config, tensors=self.state_dict(), card=_card(self, facts))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the tokenizer to a Hugging Face repository, made if need be; return its address."""
        return hub.push(self.save_pretrained, repo_id, private=private, token=token)

    @classmethod
    def from_pretrained(cls, name_or_folder: Path | str, *, revision: str | None = None) -> "ImageTokenizer":
        """Load a tokenizer, in evaluation mode on the CPU, strictly and from safetensors only.

        Args:
            name_or_folder: A folder written by `save_pretrained`, or a repository such as `SoftVQVAE/softvq-l-64`.
            revision: Branch, tag or commit of the repository.

        Returns:
            The tokenizer.

        Raises:
            InputError: If it cannot be found, or a tensor is missing, unexpected, of another shape, or not finite.
        """
        config, tensors, where = hub.load_folder(name_or_folder, kind="tokenizer", revision=revision)
        if released.is_released(config):
            config, tensors = released.convert(config, tensors, where)
        with torch.device("meta"):
            tokenizer = cls(from_dict(TokenizerConfig, config, f"{where}/config.json"))
        hub.load_strictly(tokenizer, tensors, where)
        if not bool((tokenizer.latent_std > 0).all()):
            raise InputError(
                f"{where}: latent_std holds values of 0 or less, expected deviations; fetch or fit it again"
            )
        return tokenizer.eval()

    def _decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return self.decoder(self.from_latents(latents.to(self.from_latents.weight.dtype)), size)

    def _codebook(self) -> Any:
        if not hasattr(self.quantizer, "indices"):
            raise InputError(f"the quantizer is {self.config.quantizer.kind!r}, which has no codewords to index")
        return self.quantizer

    def _check_latents(self, latents: Tensor) -> None:
        least, most = self.config.min_latent_tokens, self.config.num_latent_tokens
        fits = latents.ndim == 3 and (least or most) <= latents.shape[1] <= most
        if not fits or latents.shape[2] != self.config.latent_dim:
            tokens = most if least is None else f"{least} to {most}"
            expected = f"[batch, {tokens}, {self.config.latent_dim}]"
            raise InputError(f"latents are {list(latents.shape)}, expected {expected}")
        if not latents.is_floating_point():
            raise InputError(f"latents are {latents.dtype}, expected floats; decode_indices takes whole numbers")

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
            raise InputError(
                f"images are {list(images.shape)}, expected [batch, 3, height, width]; [None] adds the batch"
            )
        if not images.is_floating_point():
            raise InputError(f"images are {images.dtype}, expected floating-point values in [-1, 1]")
        self._check_size(images.shape[2], images.shape[3])

    def _check_size(self, height: int, width: int) -> None:
        patch = self.config.patch_size
        if height % patch or width % patch or height < patch or width < patch:
            raise InputError(f"the size is {height}x{width} pixels, expected a height and width divisible by {patch}")


def _card(tokenizer: ImageTokenizer, facts: Mapping[str, str] | None) -> str:
    config, side = tokenizer.config, tokenizer.config.image_size
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6
    fewer = f"; the first {config.min_latent_tokens} or more decode alone" if config.min_latent_tokens else ""
    return hub.model_card(
        "tokenizer",
        ["image-tokenizer", config.quantizer.kind],
        f"{side} x {side} pixels to {config.num_latent_tokens} tokens of {config.latent_dim} channels{fewer}; "
        f"quantizer\n`{config.quantizer.kind}`, {parameters:.1f} M parameters.",
        f"""from softvq import ImageTokenizer, load_image

tokenizer = ImageTokenizer.from_pretrained("this-folder-or-repository")
latents = tokenizer.encode(load_image("photo.jpg", size={side})[None])
images = tokenizer.decode(latents)""",
        facts,
    )
