"""A tokenizer in place of diffusers' `AutoencoderKL`."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.baselines import KL

__all__ = ["AutoencoderTokens", "Decoded", "Encoded", "Generators", "Posterior"]

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """What is known of latents once an image is seen: a Gaussian for KL, a point for every other quantizer.

    A point has no deviation, so every sample is its mode; its `kl` and `nll`, which would be infinite, are 0.
    """

    mean: Tensor
    """`[batch, token, dim]`, normalised."""
    logvar: Tensor
    """Logarithms of as many variances; minus infinity of a point."""
    deterministic: bool = False
    """Whether this is a point."""

    @property
    def std(self) -> Float[Tensor, "batch token dim"]:
        """Deviations; 0 of a point."""
        return (0.5 * self.logvar).exp()

    @property
    def var(self) -> Float[Tensor, "batch token dim"]:
        """Variances; 0 of a point."""
        return self.logvar.exp()

    def mode(self) -> Float[Tensor, "batch token dim"]:
        """Return the likeliest latents."""
        return self.mean

    def sample(self, generator: Generators = None) -> Float[Tensor, "batch token dim"]:
        """Draw latents, through which gradients reach mean and variance.

        Args:
            generator: Of the noise, or one for each image.

        Returns:
            Latents as `mean` has them; of a point always the same.

        Raises:
            InputError: If the generators are none, or not as many as the images.
        """
        return self.mean + self.std * _noise(generator, self.mean)

    def kl(self, other: "Posterior | None" = None) -> Float[Tensor, " batch"]:
        """Return the divergence from another Gaussian in nats, summed over each image's latents.

            KL(p | q) = 1/2 sum ((mean_p - mean_q)^2 + var_p) / var_q - 1 - log(var_p / var_q)

        Args:
            other: The Gaussian q; by default the standard normal.

        Returns:
            One number for each image; 0 of a point.

        Raises:
            InputError: If `other` is a point, or of another shape.
        """
        if other is not None and (other.deterministic or other.mean.shape != self.mean.shape):
            what = "a point" if other.deterministic else f"of latents {list(other.mean.shape)}"
            raise InputError(f"the other posterior is {what}, expected a Gaussian of {list(self.mean.shape)}")
        mean, logvar = _exact(self.mean), _exact(self.logvar)
        if self.deterministic:
            return mean.new_zeros(len(mean))
        if other is not None:
            base = _exact(other.logvar)
            mean, logvar = (mean - _exact(other.mean)) * (-0.5 * base).exp(), logvar - base
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2))

    def nll(self, sample: Float[Tensor, "batch token dim"], dims: Sequence[int] = (1, 2)) -> Tensor:
        """Return the negative log-likelihood of latents in nats.

            1/2 sum log(2 pi var) + (sample - mean)^2 / var

        Args:
            sample: Latents.
            dims: What to sum over; by default each image's latents.

        Returns:
            One number for each image, or what is left of the axes; 0 of a point.

        Raises:
            InputError: If the sample is of another shape.
        """
        if sample.shape != self.mean.shape:
            raise InputError(f"latents are {list(sample.shape)}, expected {list(self.mean.shape)}")
        mean, logvar = _exact(self.mean), _exact(self.logvar)
        if self.deterministic:
            return torch.zeros_like(mean).sum(dim=tuple(dims))
        squares = (_exact(sample) - mean).square() * (-logvar).exp()
        return 0.5 * (math.log(2 * math.pi) + logvar + squares).sum(dim=tuple(dims))


class Encoded(NamedTuple):
    """What `AutoencoderTokens.encode` returns."""

    latent_dist: Posterior
    """Of the latents."""


class Decoded(NamedTuple):
    """What `AutoencoderTokens.decode` returns."""

    sample: Tensor
    """RGB around [-1, 1], `[batch, 3, height, width]`."""


class AutoencoderTokens(nn.Module):
    """A tokenizer with the interface of diffusers' autoencoders, such as `AutoencoderKL`.

    Its latents are `[batch, token, dim]` instead of a map, and normalised already, hence a scaling factor of 1. They
    and the images are in the weights' dtype. Gradients flow as through any module: put `torch.no_grad` around it where
    none are wanted, and `requires_grad_(False)` where the weights are not to learn.

    Args:
        tokenizer: Held, not copied.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.train(tokenizer.training)
        model = tokenizer.config
        self.config = SimpleNamespace(
            scaling_factor=1.0,
            shift_factor=None,
            in_channels=3,
            out_channels=3,
            latent_channels=model.latent_dim,
            num_latent_tokens=model.num_latent_tokens,
            sample_size=model.image_size,
        )

    @classmethod
    def from_pretrained(cls, name_or_folder: Path | str, *, revision: str | None = None) -> "AutoencoderTokens":
        """Load a tokenizer; see `ImageTokenizer.from_pretrained`."""
        return cls(ImageTokenizer.from_pretrained(name_or_folder, revision=revision))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokenizer.latent_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.tokenizer.to_latents.weight.dtype

    def encode(self, images: Float[Tensor, "batch 3 height width"], return_dict: bool = True) -> Encoded:
        """Return the latents of images.

        Through quantizers that choose one codeword, such as VQ, no gradient reaches the images.

        Args:
            images: RGB in [-1, 1]; height and width divisible by the patch.
            return_dict: Not needed: the result is a tuple, and its field has a name.

        Returns:
            A `Posterior`, so wrapped.

        Raises:
            InputError: If the images are of another shape or no floats, or the patch does not divide them.
        """
        tokenizer = self.tokenizer
        before = tokenizer.encode_pre(self._here(images, "images"))
        mean = (tokenizer.quantizer.encode(before) - tokenizer.latent_mean) / tokenizer.latent_std
        if not isinstance(tokenizer.quantizer, KL):
            return Encoded(Posterior(mean.to(self.dtype), torch.full_like(mean, -math.inf, dtype=self.dtype), True))
        logvar = tokenizer.quantizer.moments(before)[1] - 2 * tokenizer.latent_std.log()
        return Encoded(Posterior(mean.to(self.dtype), logvar.to(self.dtype)))

    def decode(
        self,
        latents: Float[Tensor, "batch token dim"],
        return_dict: bool = True,
        generator: object = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> Decoded:
        """Return images for latents.

        Args:
            latents: As `encode` gives them.
            return_dict: Not needed: the result is a tuple, and its field has a name.
            generator: Not used: nothing is random here.
            size: Height and width in pixels, divisible by the patch; the model's square by default.

        Returns:
            RGB around [-1, 1], so wrapped.

        Raises:
            InputError: If the latents are not of this tokenizer's shape or no floats, or the patch does not divide the
                size.
        """
        return Decoded(self.tokenizer.decode(self._here(latents, "latents"), size))

    def forward(
        self,
        sample: Float[Tensor, "batch 3 height width"],
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> Decoded:
        """Return images encoded and decoded again, in their size.

        Args:
            sample: RGB in [-1, 1].
            sample_posterior: Whether to decode a draw instead of the mode.
            return_dict: Not needed: the result is a tuple, and its field has a name.
            generator: Of the draw.

        Returns:
            RGB around [-1, 1], so wrapped.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, size=(sample.shape[2], sample.shape[3]))

    def _here(self, values: Tensor, name: str) -> Tensor:
        if not isinstance(values, Tensor):
            raise InputError(f"{name} are of type {type(values).__name__}, expected a tensor")
        return values.to(self.device)


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _noise(generator: Generators, like: Tensor) -> Tensor:
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise InputError(f"there are {len(generator)} generators for {len(like)} images; give one each, or one")
        return torch.cat([_noise(each, like[:1]) for each in generator])
    if not isinstance(generator, torch.Generator | None):
        raise InputError(f"generator is {generator!r}, expected a torch.Generator, or a list of one for each image")
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like)
