"""A generator in place of diffusers' class-conditional pipelines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from softvq.adapters.autoencoder import Generators
from softvq.data.images import to_image
from softvq.errors import InputError
from softvq.pipeline import GenerationPipeline

__all__ = ["Generated", "TokensPipeline"]

PRECISIONS: dict[torch.dtype | None, Literal["auto", "bf16", "fp32"]] = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    None: "auto",
}


class Generated(NamedTuple):
    """What `TokensPipeline` returns."""

    images: Any
    """A list of pictures, an array or a tensor."""


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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pipeline.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return self.pipeline.dtype

    def to(self, device: torch.device | str | torch.dtype, dtype: torch.dtype | None = None) -> "TokensPipeline":
        """Move the weights.

        Args:
            device: For example `cuda`; or a dtype alone.
            dtype: `torch.bfloat16` or `torch.float32`; by default as it is where the weights were rounded to bf16
                already, else bf16 on CUDA and float32 elsewhere.

        Returns:
            This object.

        Raises:
            InputError: If there is no such device, the dtype is another, or the weights were rounded before.
        """
        if isinstance(device, torch.dtype):
            device, dtype = self.device, device
        if dtype is None and self.dtype == torch.bfloat16:
            dtype = self.dtype
        if dtype not in PRECISIONS:
            raise InputError(f"dtype is {dtype}, expected torch.bfloat16 or torch.float32")
        self.pipeline.to(device, PRECISIONS[dtype])
        return self

    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Generated:
        """Make one image for each label.

        Args:
            class_labels: Names or numbers of classes.
            num_inference_steps: Of the sampler; the generator's own by default.
            guidance_scale: 1 is none; the generator's own by default.
            generator: Decides the seed, or one for each image theirs; without one the seed is 0.
            output_type: `pil` for a list of pictures, `np` for `[batch, height, width, 3]` from 0 to 1, or `pt` for
                `[batch, 3, height, width]` from 0 to 1.
            return_dict: Not needed: the result is a tuple, and its field has a name.

        Returns:
            The images, so wrapped.

        Raises:
            InputError: If a class is unknown, or the type of output.
        """
        if output_type not in ("pil", "np", "pt"):
            raise InputError(f"output_type is {output_type!r}, expected pil, np or pt")
        seed = [_seed(each) for each in generator] if isinstance(generator, Sequence) else _seed(generator)
        made = self.pipeline(class_labels, seed=seed, steps=num_inference_steps, guidance=guidance_scale)
        if output_type == "pil":
            return Generated([to_image(image) for image in made])
        images = made / 2 + 0.5
        return Generated(images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy())


def _seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator is {generator!r}, expected a torch.Generator, or a list of one for each image")
    return int(torch.randint(1 << 31, (), generator=generator, device=generator.device))
