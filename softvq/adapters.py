"""The tokenizer as other libraries expect one: diffusers' autoencoders, torchvision's transforms, `datasets`' map."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.data.images import center_crop, to_image, to_tensor
from softvq.errors import InputError
from softvq.pipeline import GenerationPipeline
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.baselines import KL

__all__ = ["AutoencoderTokens", "Posterior", "ToTokens", "TokensPipeline", "tokenize_images"]


@dataclasses.dataclass(frozen=True, slots=True)
class Posterior:
    """What is known of latents once an image is seen: a Gaussian for KL, a point for every other quantizer."""

    mean: Tensor
    """`[batch, token, dim]`, normalised, float32."""
    std: Tensor
    """As many deviations; 0 where the posterior is a point."""

    def mode(self) -> Float[Tensor, "batch token dim"]:
        """Return the likeliest latents."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "batch token dim"]:
        """Draw latents; of a point always the same."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(self.mean.device)


class AutoencoderTokens:
    """A tokenizer with the interface of diffusers' autoencoders, such as `AutoencoderKL`.

    Its latents are `[batch, token, dim]` instead of a map, and normalised already, hence a scaling factor of 1.

    Args:
        tokenizer: In evaluation mode.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer = tokenizer
        model = tokenizer.config
        self.config = SimpleNamespace(
            scaling_factor=1.0,
            shift_factor=None,
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

    def to(self, device: torch.device | str) -> "AutoencoderTokens":
        """Move the weights to a device, and return this object."""
        self.tokenizer.to(device)
        return self

    @torch.inference_mode()
    def encode(self, images: Float[Tensor, "batch 3 height width"], return_dict: bool = True) -> Any:
        """Return the latents of images.

        Args:
            images: RGB in [-1, 1]; height and width divisible by the patch.
            return_dict: Whether the posterior is the field `latent_dist` of an object, or the only one of a tuple.

        Returns:
            A `Posterior`, so wrapped.

        Raises:
            InputError: If the height or width is not divisible by the patch.
        """
        tokenizer = self.tokenizer
        before = tokenizer.encode_pre(images.to(self.device))
        mean = (tokenizer.quantizer.encode(before) - tokenizer.latent_mean) / tokenizer.latent_std
        std = torch.zeros_like(mean)
        if isinstance(tokenizer.quantizer, KL):
            std = (0.5 * tokenizer.quantizer.moments(before)[1]).exp() / tokenizer.latent_std
        posterior = Posterior(mean, std)
        return SimpleNamespace(latent_dist=posterior) if return_dict else (posterior,)

    @torch.inference_mode()
    def decode(self, latents: Float[Tensor, "batch token dim"], return_dict: bool = True) -> Any:
        """Return images for latents.

        Args:
            latents: As `encode` gives them.
            return_dict: Whether the images are the field `sample` of an object, or the only one of a tuple.

        Returns:
            RGB around [-1, 1], so wrapped.

        Raises:
            InputError: If the latents are not of this tokenizer's shape.
        """
        images = self.tokenizer.decode(latents.to(self.device))
        return SimpleNamespace(sample=images) if return_dict else (images,)


class TokensPipeline:
    """A generator with the call of diffusers' class-conditional pipelines, such as `DiTPipeline`.

    Args:
        pipeline: A generator with its tokenizer.
    """

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def from_pretrained(cls, name_or_folder: Path | str) -> "TokensPipeline":
        """Load a generator with its tokenizer; see `GenerationPipeline.from_pretrained`."""
        return cls(GenerationPipeline.from_pretrained(name_or_folder))

    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Make one image for each label.

        Args:
            class_labels: Names or numbers of classes.
            num_inference_steps: Of the sampler; the generator's own by default.
            guidance_scale: 1 is none; the generator's own by default.
            generator: Decides the seed; without one it is 0.
            output_type: `pil` for a list of pictures, `np` for `[batch, height, width, 3]` from 0 to 1, or `pt` for
                `[batch, 3, height, width]` from 0 to 1.
            return_dict: Whether they are the field `images` of an object, or the only one of a tuple.

        Returns:
            The images, so wrapped.

        Raises:
            InputError: If a class is unknown, or the type of output.
        """
        if output_type not in ("pil", "np", "pt"):
            raise InputError(f"output_type is {output_type!r}, expected pil, np or pt")
        seed = 0
        if generator is not None:
            seed = int(torch.randint(1 << 31, (), generator=generator, device=generator.device))
        made = self.pipeline(class_labels, seed=seed, steps=num_inference_steps, guidance=guidance_scale)
        images: Any = made / 2 + 0.5
        if output_type == "pil":
            images = [to_image(image) for image in made]
        elif output_type == "np":
            images = images.permute(0, 2, 3, 1).numpy()
        return SimpleNamespace(images=images) if return_dict else (images,)


class ToTokens:
    """A picture to its latents, as the last transform of a `torchvision.transforms.v2.Compose`.

    In a `DataLoader` with workers the tokenizer has to be on the CPU, and each worker takes a thread; on a GPU tokenize
    whole batches instead, with `ImageTokenizer.encode` or `softvq cache-latents`.

    Args:
        tokenizer: In evaluation mode.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def __call__(self, picture: Image.Image | Tensor) -> Float[Tensor, "*batch token dim"]:
        """Return normalised latents.

        Args:
            picture: A PIL image, cut to the model's square as everywhere in softvq; or RGB of its size, `[3, height,
                width]` or a batch of them, uint8 from 0 to 255 or floats from -1 to 1.

        Returns:
            `[token, dim]`, or a batch of them, float32, on the tokenizer's device.

        Raises:
            InputError: If the picture is none of these.
        """
        images = _as_images(picture, self.tokenizer.config.image_size)
        latents = self.tokenizer.encode(images.to(self.tokenizer.latent_mean.device))
        return latents if isinstance(picture, Tensor) and picture.ndim == 4 else latents[0]


def tokenize_images(
    tokenizer: ImageTokenizer, column: str = "image"
) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, Any]]:
    """Return a function for `datasets.Dataset.map(..., batched=True)` that adds a column `latents`.

    Args:
        tokenizer: In evaluation mode.
        column: Of the pictures, PIL images as `datasets.Image` gives them.

    Returns:
        A function of a batch of rows; latents are float16, `[token][dim]` for each row.
    """
    # not a function made here: `datasets` takes a fingerprint of what it is given, which is slow of such
    return functools.partial(_tokenized, tokenizer, column)


@torch.inference_mode()
def _tokenized(tokenizer: ImageTokenizer, column: str, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    if column not in rows:
        raise InputError(f"there is no column {column!r}, only {', '.join(rows)}; name that of the pictures")
    size = tokenizer.config.image_size
    images = torch.cat([_as_images(picture, size) for picture in rows[column]])
    return {"latents": tokenizer.encode(images.to(tokenizer.latent_mean.device)).half().cpu().numpy()}


def _as_images(picture: object, size: int) -> Float[Tensor, "batch 3 height width"]:
    if isinstance(picture, Image.Image):
        return to_tensor(center_crop(picture.convert("RGB"), size))[None]
    if not isinstance(picture, Tensor) or picture.ndim not in (3, 4) or picture.shape[-3] != 3:
        kind = f"a tensor {list(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
        raise InputError(f"the picture is {kind}, expected a PIL image, or one [3, height, width] or a batch")
    if picture.dtype != torch.uint8 and not picture.is_floating_point():
        raise InputError(f"the picture is {picture.dtype}, expected uint8 from 0 to 255 or floats from -1 to 1")
    images = picture.float() / 127.5 - 1 if picture.dtype == torch.uint8 else picture
    return images if images.ndim == 4 else images[None]
