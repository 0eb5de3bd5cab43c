"""From labels to images: a generator makes latents, its tokenizer paints them."""

import contextlib
import dataclasses
import difflib
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from softvq import hub
from softvq.backbones import compute_dtype
from softvq.errors import InputError, RunError
from softvq.generators.generator import LatentGenerator, TokenizerReference
from softvq.generators.heads import HeadBlock
from softvq.generators.process import Watch
from softvq.generators.recipe import SamplingRecipe
from softvq.generators.transformer import LatentTransformer, ModulatedBlock
from softvq.inference.accelerate import accelerate
from softvq.randomness import keys_of
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["GenerationPipeline", "class_numbers", "keys_of_images", "load_its_tokenizer"]

MAX_DIGITS = 20


class GenerationPipeline:
    """A generator with the tokenizer it was trained on.

        pipeline = GenerationPipeline.from_pretrained("runs/sit/generator").to("cuda")
        images = pipeline(["rose", "tulip"], seed=0)

    Args:
        generator: Makes latents.
        tokenizer: Paints them.
        guide: A worse generator of the same latents, for autoguidance; None guides by the null class.

    Raises:
        InputError: If the tokenizer is not the generator's.
    """

    def __init__(
        self, generator: LatentGenerator, tokenizer: ImageTokenizer, guide: LatentGenerator | None = None
    ) -> None:
        check_tokenizer(generator, tokenizer)
        if guide is not None:
            generator.checked(guide=guide)
        self.generator, self.tokenizer, self.guide = generator.eval(), tokenizer.eval(), guide
        self.dtype = torch.float32

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: Path | str,
        *,
        tokenizer: Path | str | None = None,
        guide: Path | str | None = None,
        revision: str | None = None,
    ) -> "GenerationPipeline":
        """Load a generator and its tokenizer, in float32 on the CPU.

        Args:
            name_or_folder: A folder of a generator, or a repository such as `SoftVQVAE/sit-xl_softvq-l-64`.
            tokenizer: Its tokenizer, where that is no longer where the generator remembers it.
            guide: Another generator, for autoguidance.
            revision: Branch, tag or commit of the generator's repository.

        Returns:
            The pipeline.

        Raises:
            InputError: If something cannot be found, or the tokenizer is another one.
        """
        generator = LatentGenerator.from_pretrained(name_or_folder, revision=revision)
        return cls(
            generator,
            load_its_tokenizer(generator, hub.locate(name_or_folder, revision=revision), tokenizer),
            None if guide is None else LatentGenerator.from_pretrained(guide),
        )

    def save_pretrained(self, folder: Path | str, *, facts: Mapping[str, str] | None = None) -> None:
        """Write the generator into a folder, and its tokenizer into `tokenizer/` in it, so that they stay together.

        Args:
            folder: Made if need be; files of these names are replaced, but cards are left as they are.
            facts: For the generator's card, see `softvq.hub.model_card`.

        Raises:
            InputError: If the weights were rounded by `to`.
            RunError: If the files cannot be written.
        """
        if self.dtype == torch.bfloat16:
            raise InputError("the weights were rounded to bf16 for this device; load the pipeline again, and save that")
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        self.generator.tokenizer = TokenizerReference(name="tokenizer", fingerprint=self.tokenizer.latent_fingerprint())
        self.generator.save_pretrained(folder, facts=facts)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload both to a Hugging Face repository, made if need be; return its address."""
        return hub.push(self.save_pretrained, repo_id, private=private, token=token)

    def to(
        self, device: torch.device | str, precision: Literal["auto", "bf16", "fp32"] = "auto"
    ) -> "GenerationPipeline":
        """Move everything to a device.

        Args:
            device: For example `cuda`.
            precision: Of the networks; auto is bf16 on CUDA. Solvers are float32 in any case. The generator's weights
                are rounded to bf16 for good, so that it can no longer be saved.

        Returns:
            The pipeline itself.

        Raises:
            InputError: If there is no such device, or the weights were rounded before.
        """
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise InputError(f"device is {device!r}, expected cpu, or cuda with or without a number") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device is {device}, but there is no CUDA here; take cpu")
        dtype = compute_dtype(precision, device)
        if self.dtype == torch.bfloat16 and dtype != self.dtype:
            raise InputError("the networks were rounded to bf16, which cannot be undone; load the pipeline again")
        self.dtype = dtype
        for model in (self.generator, self.guide):
            if model is not None:
                model.to(device, self.dtype)
        self.tokenizer.to(device)
        return self

    def compile(self, *, fp8: bool = False) -> "GenerationPipeline":
        """Make the networks faster: slow at the first call with a batch size, faster from then on; return the pipeline.

        In bf16 on CUDA see `softvq.inference.accelerate`; elsewhere, and for MAR, `torch.compile` takes the blocks.

        Args:
            fp8: Round what is multiplied in the blocks to 8 bits, which changes images slightly; see docs/speed.md.

        Returns:
            The pipeline itself, for use by one thread.

        Raises:
            InputError: If `fp8` is asked for where it cannot be.
        """
        fast = self.device.type == "cuda" and self.dtype == torch.bfloat16
        if fp8 and not fast:
            raise InputError(f"fp8 needs networks in bf16 on CUDA, these are {self.dtype} on {self.device}")
        for model in (self.generator, self.guide):
            if model is not None and fast and isinstance(model.network, LatentTransformer):
                accelerate(model.network, "fp8" if fp8 else "bf16")
            elif model is not None:
                _compile(model)
        if fast:
            accelerate(self.tokenizer, "fp8" if fp8 else "bf16")
        else:
            _compile(self.tokenizer.decoder)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.tokenizer.latent_mean.device

    @torch.inference_mode()
    def __call__(
        self,
        labels: Sequence[int | str] | Shaped[Tensor, "batch *conditiondim"],
        *,
        seed: int | Sequence[int] | Tensor = 0,
        recipe: SamplingRecipe | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Make one image for each label.

        Args:
            labels: Names or numbers of classes, or embeddings `[batch, dim]`; for a generator without conditions
                anything of the right length.
            seed: One number, with which the image at each place is always the same; or one for each image. An image
                depends on its label, its seed and place, and the recipe; not on the batch it is made in.
            recipe: How; by default the generator's own.
            steps: Overrules those of the recipe.
            guidance: Overrules the scale of the recipe's guidance.
            batch_size: Images made at once.
            progress: Called with the number of images made, after each batch.

        Returns:
            RGB in [-1, 1], float32, on the CPU.

        Raises:
            InputError: If a class is unknown, or the generator cannot be sampled so.
            RunError: If an image is not finite.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1")
        condition = class_numbers(labels, self.generator)
        keys = keys_of_images(seed, len(condition))
        recipe = _changed(recipe or self.generator.sampling, steps, guidance)
        images = []
        for start in range(0, len(condition), batch_size):
            part = slice(start, start + batch_size)
            latents = self.latents(condition[part], keys[part], recipe)
            images.append(self.paint(latents))
            if progress is not None:
                progress(len(images[-1]))
        return torch.cat(images)

    @torch.inference_mode()
    def latents(
        self,
        condition: Shaped[Tensor, "batch *conditiondim"],
        keys: Int64[Tensor, " batch"],
        recipe: SamplingRecipe | None = None,
        watch: Watch | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        """Make latents, on the device; see `LatentGenerator.sample`."""
        condition, keys = condition.to(self.device), keys.to(self.device)
        return self.generator.sample(condition, keys, recipe, guide=self.guide, watch=watch)

    @torch.inference_mode()
    def paint(self, latents: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch 3 height width"]:
        """Decode latents to RGB in [-1, 1] on the CPU; a RunError says if an image is not finite."""
        low = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext():
            images = self.tokenizer.decode(latents).float()
        if not bool(images.isfinite().all()):
            raise RunError("the images are not finite; try precision fp32, another sampler, or less guidance")
        return images.clamp(-1, 1).cpu()


def load_its_tokenizer(
    generator: LatentGenerator, folder: Path | str, given: Path | str | None = None
) -> ImageTokenizer:
    """Load the tokenizer a generator was trained on.

    Args:
        generator: Remembers its name.
        folder: Where the generator was loaded from, which a relative name starts at.
        given: Overrules the name.

    Returns:
        The tokenizer.

    Raises:
        InputError: If it cannot be found.
    """
    name = generator.tokenizer.name
    if given is None and name is None:
        raise InputError(f"{folder}: does not say which tokenizer its latents are of; name it with tokenizer")
    if given is None and name is not None:
        given = Path(folder) / name if os.path.isdir(Path(folder) / name) else name  # which takes any length
    assert given is not None
    try:
        return ImageTokenizer.from_pretrained(given)
    except InputError as error:
        raise InputError(f"the tokenizer of {folder} cannot be loaded: {error}") from error


def check_tokenizer(generator: LatentGenerator, tokenizer: ImageTokenizer) -> None:
    """Refuse a tokenizer that a generator was not trained on.

    Args:
        generator: Remembers its tokenizer's fingerprint, unless it was released without one.
        tokenizer: The one that is to paint.

    Raises:
        InputError: If it is another, or its latents have another shape.
    """
    model, latents = generator.config, tokenizer.config
    most, dim = latents.num_latent_tokens, latents.latent_dim
    if not (latents.min_latent_tokens or most) <= model.num_tokens <= most or dim != model.latent_dim:
        made = f"{model.num_tokens} of {model.latent_dim}"
        raise InputError(f"the tokenizer has {most} tokens of {dim}, the generator makes {made}")
    expected, given = generator.tokenizer.fingerprint, tokenizer.latent_fingerprint()
    if expected is not None and expected != given:
        raise InputError(
            f"the tokenizer is {given[:12]}, the generator was trained on {expected[:12]}; give that one, or train a "
            "generator on this one"
        )


def class_numbers(
    labels: Sequence[int | str] | Shaped[Tensor, "batch *conditiondim"], generator: LatentGenerator
) -> Shaped[Tensor, "batch *conditiondim"]:
    """Return what a generator is asked for as it takes it.

    Args:
        labels: Names or numbers of classes, or embeddings.
        generator: Knows its classes.

    Returns:
        Class numbers `[batch]`, or the embeddings in float32.

    Raises:
        InputError: If a class is unknown, or there is nothing to make.
    """
    config = generator.config
    if isinstance(labels, str) or not isinstance(labels, Sequence | Tensor) or not len(labels):
        raise InputError(f"labels is {labels!r}, expected one label for each image, such as [0, 1]")
    if config.condition == "embedding":
        if not isinstance(labels, Tensor) or labels.shape[1:] != (config.condition_dim,):
            raise InputError(f"the generator is asked by embeddings: give a tensor [batch, {config.condition_dim}]")
        return labels.float()
    if config.condition == "none":
        return torch.zeros(len(labels), dtype=torch.int64)
    if isinstance(labels, Tensor) and (labels.ndim != 1 or labels.is_floating_point()):
        raise InputError(f"labels are {list(labels.shape)} of {labels.dtype}, expected whole numbers [batch]")
    given = labels.tolist() if isinstance(labels, Tensor) else labels
    return torch.tensor([_number(label, generator) for label in given])


def keys_of_images(seed: int | Sequence[int] | Tensor, count: int) -> Int64[Tensor, " batch"]:
    """Return the keys of images, from which all their noise is drawn.

    Args:
        seed: One for all, or one for each.
        count: Number of images.

    Returns:
        One key per image; a seed given alone makes the image that stands first under it.

    Raises:
        InputError: If the seeds are not as many as the images.
    """
    if isinstance(seed, numbers.Integral):
        return keys_of(int(seed), "image", torch.arange(count))
    seeds = seed.tolist() if isinstance(seed, Tensor) else seed
    if not isinstance(seeds, Sequence) or not all(isinstance(one, numbers.Integral) for one in seeds):
        raise InputError(f"seed is {seed!r}, expected a whole number, or one for each image")
    if len(seeds) != count:
        raise InputError(f"there are {len(seeds)} seeds for {count} images; give one each, or a single number")
    return torch.cat([keys_of(int(one), "image", torch.zeros(1, dtype=torch.int64)) for one in seeds])


def _changed(recipe: SamplingRecipe, steps: int | None, guidance: float | None) -> SamplingRecipe:
    if steps is not None:
        recipe = dataclasses.replace(recipe, steps=steps)
    if guidance is not None:
        recipe = dataclasses.replace(recipe, guidance=dataclasses.replace(recipe.guidance, scale=guidance))
    return recipe


def _compile(model: nn.Module) -> None:
    """Compile block by block: equal ones share their code, so that depth costs no time at the start."""
    for module in model.modules():
        if isinstance(module, Block | HeadBlock | ModulatedBlock):
            module.compile(dynamic=False)


def _number(label: int | str, generator: LatentGenerator) -> int:
    classes, count = generator.classes, generator.config.num_classes
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, str) and not label.isdecimal():
        if not classes:
            raise InputError(f"{label!r} is no class: this generator's have numbers only, 0 to {count - 1}")
        close = difflib.get_close_matches(label, classes, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(classes[:10])}"
        raise InputError(f"{label!r} is no class of this generator; {hint}")
    if isinstance(label, bool) or not isinstance(label, str | numbers.Integral):
        raise InputError(f"{label!r} is no class; give names or whole numbers")
    number = int(label) if not isinstance(label, str) or len(label) < MAX_DIGITS else count
    if not 0 <= number < count:
        raise InputError(f"class {label} is out of range, expected 0 to {count - 1}")
    return number
