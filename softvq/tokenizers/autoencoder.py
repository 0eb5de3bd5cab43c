"""The tokenizer: images to latents and back, with the statistics that normalise the latents on board."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softvq import hub
from softvq.config import from_dict, to_dict
from softvq.errors import InputError
from softvq.tokenizers import released
from softvq.tokenizers.codebooks import check_groups
from softvq.tokenizers.quantizers import QuantizerConfig, SoftVQConfig, VQConfig, build_quantizer
from softvq.tokenizers.vit import ViTConfig, ViTDecoder, ViTEncoder, load_timm_weights

__all__ = ["ImageTokenizer", "TokenizerConfig", "TokenizerOutput"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Everything that determines a tokenizer's architecture."""

    encoder: ViTConfig
    """The transformer that reads patches."""
    decoder: ViTConfig
    """The transformer that paints them."""
    num_latent_tokens: int = 64
    """Latent tokens L per image."""
    latent_dim: int = 32
    """Channels d of each latent token."""
    quantizer: QuantizerConfig = dataclasses.field(default_factory=SoftVQConfig)
    """What turns the encoder's outputs into latents."""
    image_size: int = 256
    """Side in pixels that the position tables are made for; other sizes resample them."""
    patch_size: int = 16
    """Side of a patch in pixels."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for name, value, most in (
            ("num_latent_tokens", self.num_latent_tokens, 4096),
            ("latent_dim", self.latent_dim, 4096),
            ("patch_size", self.patch_size, 128),
            ("image_size", self.image_size, 8192),
        ):
            if not 1 <= value <= most:
                raise InputError(f"{name} is {value}, expected 1 to {most}")
        if self.image_size % self.patch_size:
            raise InputError(f"image_size is {self.image_size}, expected a multiple of patch_size ({self.patch_size})")
        num_codebooks = getattr(self.quantizer, "num_codebooks", 1)
        check_groups(self.num_latent_tokens, num_codebooks)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerOutput:
    """What a training step needs."""

    images: Tensor
    """Reconstructions, `[batch, 3, height, width]`, not clamped."""
    latents: Tensor
    """Latents before normalisation, `[batch, token, dim]`."""
    losses: dict[str, Tensor]
    """The quantizer's own loss terms, already weighted."""


class ImageTokenizer(nn.Module):
    """Images in [-1, 1] to L continuous latent tokens and back.

    `encode` gives latents normalised by `latent_mean` and `latent_std` (a pair a channel, buffers saved with the
    weights), and `decode` takes them; `encode_raw` and `decode_raw` do without. Images of any size that the patch
    divides encode to the same number of tokens.

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
        if isinstance(config.quantizer, SoftVQConfig | VQConfig):
            nn.init.normal_(
                self.from_latents.weight
            )  # unit vectors in, unit variance out, as the decoder's positions have
        self.decoder = ViTDecoder(config.decoder, **sizes)
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> TokenizerOutput:
        """Reconstruct images for training: with the quantizer's loss terms and, where it has any, its noise."""
        latents, losses = self.quantizer(self.encode_pre(images))
        size = (images.shape[-2], images.shape[-1])
        return TokenizerOutput(images=self.decode_raw(latents, size), latents=latents, losses=losses)

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
            latents: As `encode` gives them.
            size: Height and width in pixels, divisible by the patch; the config's `image_size` squared by default.

        Returns:
            RGB around [-1, 1].

        Raises:
            InputError: If the latents are not of this tokenizer's shape, or the size is not divisible by the patch.
        """
        return self.decode_raw(latents * self.latent_std + self.latent_mean, size)

    def encode_raw(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch token dim"]:
        """Return the latents as the quantizer gives them; otherwise like `encode`."""
        return self.quantizer.encode(self.encode_pre(images))

    def decode_raw(
        self, latents: Float[Tensor, "batch token dim"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return images for latents as the quantizer gives them; otherwise like `decode`."""
        expected = (self.config.num_latent_tokens, self.config.latent_dim)
        if latents.shape[1:] != expected:
            raise InputError(f"latents are {list(latents.shape[1:])} for each image, expected {list(expected)}")
        size = size or (self.config.image_size, self.config.image_size)
        self._check_size(*size)
        return self.decoder(self.from_latents(latents.to(self.from_latents.weight.dtype)), size)

    def encode_pre(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch token channel"]:
        """Return what the quantizer sees: the encoder's outputs after the linear layer to its input channels."""
        self._check_images(images)
        return self.to_latents(self.encoder(images))

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
        """Return a SHA-256 over the config and every weight; files made with a tokenizer carry it."""
        digest = hashlib.sha256(json.dumps(to_dict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json`, `model.safetensors` and a model card into `folder`.

        Args:
            folder: Made if need be; files in it of these names are replaced.

        Raises:
            RunError: If the files cannot be written; what was there before is untouched.
        """
        config = to_dict(self.config)
        hub.save_folder(folder, kind="tokenizer", config=config, tensors=self.state_dict(), card=_card(self))

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

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
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


def _card(tokenizer: ImageTokenizer) -> str:
    config = tokenizer.config
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6
    return f"""---
library_name: softvq
tags: [image-tokenizer, {config.quantizer.kind}]
---
# softvq tokenizer

{config.image_size} x {config.image_size} pixels to {config.num_latent_tokens} tokens of {config.latent_dim} channels;
quantizer `{config.quantizer.kind}`, {parameters:.1f} M parameters.

```python
from softvq import ImageTokenizer, load_image

tokenizer = ImageTokenizer.from_pretrained("this-folder-or-repository")
latents = tokenizer.encode(load_image("photo.jpg", size={config.image_size})[None])
images = tokenizer.decode(latents)
```
"""
