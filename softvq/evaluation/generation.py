"""Generated images as a set to be scored, the settings of a sweep, and what a report shows of both.

Images are made while they are scored and then forgotten, so that 50,000 of them need no more room than a batch.
"""

import dataclasses
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from softvq.data.images import to_image
from softvq.errors import InputError
from softvq.evaluation.charts import line_chart
from softvq.evaluation.image_sets import ImageBatch, ImageSet
from softvq.evaluation.neighbours import nearest
from softvq.evaluation.pictures import grid
from softvq.evaluation.set_features import SetFeatures
from softvq.generators.generator import LatentGenerator
from softvq.generators.recipe import SamplerName, SamplingRecipe
from softvq.pipeline import GenerationPipeline, class_numbers, keys_of_images
from softvq.ranks import world_size

__all__ = [
    "DISTANCES",
    "NEAREST",
    "FirstPictures",
    "Nearest",
    "best_of",
    "generated",
    "nearest_references",
    "picture_grid",
    "ratios",
    "recipe_beside",
    "setting_name",
    "sweep",
    "sweep_charts",
]

RECIPE, SAMPLES = "recipe.json", "samples.npz"
SHOWN = 64
"""Pictures of a grid."""
QUERIES, ANSWERS = 10, 4
"""Samples whose nearest reference pictures are shown, and how many of those."""
SAME = 1e-10
"""Below it 1 - cos is rounding: the images are the same."""
DISTANCES = ("frechet_distance", "spatial_frechet_distance", "kernel_distance", "cmmd")
"""Figures that can be divided by those of the validation photographs."""
NEAREST = "nearest_distance"
"""The figure that is the median of `Nearest`."""
CHARTED = ("frechet_distance", "precision", "recall")


def sweep(
    generator: LatentGenerator,
    guidance: Sequence[float] | None,
    steps: Sequence[int] | None,
    samplers: Sequence[SamplerName] | None = None,
) -> list[SamplingRecipe]:
    """Return a recipe for each combination of guidance scale, number of steps and sampler.

    Args:
        generator: Its own recipe decides everything else.
        guidance: Scales; None takes the generator's own.
        steps: Numbers of steps; None takes the generator's own.
        samplers: Solvers; None takes the generator's own.

    Returns:
        Recipes that are checked against the generator, with nothing left to be chosen: all scales of the first number
        of steps, then those of the next, and all of these for each sampler.

    Raises:
        InputError: If a value is given twice or the generator cannot be sampled so.
    """
    stored = generator.sampling
    for name, given in (("--guidance", guidance), ("--steps", steps), ("--sampler", samplers)):
        twice = [value for place, value in enumerate(given or ()) if value in (given or ())[:place]]
        if twice:
            said = twice[0] if isinstance(twice[0], str) else f"{twice[0]:g}"
            raise InputError(f"{name} has {said} twice; give each value once")
    return [
        generator.checked(
            dataclasses.replace(
                stored, sampler=sampler, steps=count, guidance=dataclasses.replace(stored.guidance, scale=scale)
            )
        )
        for sampler in samplers or [stored.sampler]
        for count in steps or [stored.steps]
        for scale in guidance or [stored.guidance.scale]
    ]


def generated(
    pipeline: GenerationPipeline, recipe: SamplingRecipe, count: int, *, seed: int, batch_size: int, source: str
) -> ImageSet:
    """Return images that are made when they are asked for, with all classes in turn: those of `softvq sample`.

    Batches are made as if one process made all of them, so that the shares of ranks are the same images to the bit.

    Args:
        pipeline: On its device.
        recipe: As `sweep` gives it.
        count: Images, >= 1.
        seed: Of all images.
        batch_size: Images made at once, >= 1.
        source: What to call the set.

    Returns:
        The set; every look at it makes the images again.

    Raises:
        InputError: If the generator is asked by embeddings, of which there are no names to take in turn.
    """
    config = pipeline.generator.config
    if config.condition == "embedding":
        raise InputError(f"{source}: is asked by embeddings, which have no names; make the images in Python instead")
    classes = config.num_classes if config.condition == "class" else 1
    numbers = [place % classes for place in range(count)]
    condition, keys = class_numbers(numbers, pipeline.generator), keys_of_images(seed, count)
    names = pipeline.generator.classes or [str(number) for number in range(classes)]

    def items(start: int, stop: int) -> Any:
        for first in range(start - start % batch_size, stop, batch_size):
            part = slice(first, min(first + batch_size, count))
            images = pipeline.paint(pipeline.latents(condition[part], keys[part], recipe))
            pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
            yield from pixels[max(start - first, 0) : stop - first]

    side = pipeline.tokenizer.config.image_size
    return ImageSet(
        source=source,
        count=count,
        size=(side, side),
        crop="none",
        kind="memory",
        names=[f"{place:06d}-{names[number]}" for place, number in enumerate(numbers)],
        items=items,
    )


def recipe_beside(source: Path, count: int) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what `softvq sample` wrote down beside its images.

    Args:
        source: The folder it wrote, or the `samples.npz` in it; anything else has no recipe.
        count: Images that are there.

    Returns:
        The recipe or None, and a remark if there are not as many images as it says.

    Raises:
        InputError: If there is a recipe that cannot be read.
    """
    path = source / RECIPE if source.is_dir() else source.parent / RECIPE
    if not path.is_file() or (source.is_file() and source.name != SAMPLES):
        return None, []
    try:
        recipe = json.loads(path.read_bytes())
        json.dumps(recipe, allow_nan=False)  # NaN is no JSON, and could not be written down again
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no whole JSON file, so how the images were made is unknown; remove it") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: is no recipe of softvq sample; remove it")
    asked = recipe.get("n")
    if asked in (None, count):
        return recipe, []
    return recipe, [f"{source}: holds {count} images, but its {RECIPE} speaks of {asked}; it may have been interrupted"]


class FirstPictures:
    """Keeps the first images of a set while it is read, whichever rank reads them.

    Args:
        images: The set.
        most: How many are kept, >= 1.
    """

    def __init__(self, images: ImageSet, most: int = SHOWN) -> None:
        count = min(most, images.count)
        self._pixels = torch.zeros(count, 3, *images.size, dtype=torch.uint8)

    def __call__(self, batch: ImageBatch) -> None:
        """Take from a batch what belongs to the first."""
        is_first = batch.places < len(self._pixels)
        self._pixels[batch.places[is_first]] = batch.pixels[is_first]

    def over_ranks(self) -> UInt8[Tensor, "image 3 height width"]:
        """Return what all ranks have kept together; every rank must call it."""
        pixels = self._pixels.clone()
        if world_size() > 1:
            dist.all_reduce(pixels)  # each image lies on one rank, the others have zeros in its place
        return pixels


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """How far samples lie from the nearest reference images, by the angle between features."""

    median: float
    """Of 1 - cos over all samples, 0 to 2; far below that of photographs, samples are learned by heart."""
    copies: int
    """Samples that the network cannot tell from an image of the reference."""
    distances: Float[Tensor, "query answer"]
    """Of the first samples, nearest first."""
    places: Int64[Tensor, "query answer"]
    """Which reference images those are."""


def nearest_references(samples: SetFeatures, reference: SetFeatures) -> Nearest | None:
    """Look for the nearest reference images of samples.

    Args:
        samples: Features of all of them.
        reference: Features of the same network.

    Returns:
        What was found, on the CPU; None where there are only statistics of one of the two.
    """
    if samples.features is None or reference.features is None:
        return None
    closest, _ = nearest(samples.features, reference.features)
    answers = min(ANSWERS, len(reference.features))
    distances, places = nearest(samples.features[:QUERIES], reference.features, count=answers)
    copies = int((closest < SAME).sum())
    return Nearest(
        median=float(closest.double().median()), copies=copies, distances=distances.cpu(), places=places.cpu()
    )


def ratios(figures: Mapping[str, float], validation: Mapping[str, float]) -> dict[str, float]:
    """Return every distance as a multiple of that of validation photographs, which is 1 for what looks like them.

    Args:
        figures: Of samples.
        validation: Of as many photographs that are not in the reference.

    Returns:
        The quotients of `DISTANCES` that both have; an estimate that is not above 0, as those without bias can be, has
        none.
    """
    return {key: figures[key] / validation[key] for key in DISTANCES if key in figures and validation.get(key, 0.0) > 0}


def setting_name(settings: Mapping[str, float | str]) -> str:
    """Return a setting of a generator in words, or `samples` where nothing could be set.

    >>> setting_name({"guidance": 2.0, "steps": 50})
    'guidance 2, steps 50'

    Args:
        settings: As the rows of the result file have it.

    Returns:
        A few words.
    """
    said = (f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in settings.items())
    return ", ".join(said) or "samples"


def best_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row of the smallest Fréchet distance, of those with the network of the first.

    Args:
        rows: Of the result file, at least one.

    Returns:
        One of them, the first of equal ones.
    """
    own = [row for row in rows if row["network"] == rows[0]["network"]]
    return min(own, key=lambda row: row["figures"]["frechet_distance"])


def picture_grid(
    pixels: UInt8[Tensor, "image 3 height width"], columns: int | None = None, captions: Sequence[str] = ()
) -> Image.Image:
    """Lay 8-bit pictures out in rows.

    Args:
        pixels: At least one.
        columns: In a row; None makes about as many rows as columns.
        captions: One for each, or none at all.

    Returns:
        An RGB image on white.
    """
    columns = columns or max(1, round(math.sqrt(len(pixels))))
    return grid([to_image(picture / 127.5 - 1) for picture in pixels], columns, captions)


def sweep_charts(rows: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """Draw distance, precision and recall against the guidance scale, with a line for each number of steps.

    Where there is one scale, they are drawn against the steps; of several samplers against evaluations of the network,
    with a line for each.

    Args:
        rows: Of the result file, with `network`, `settings`, `figures` and `labels`.

    Returns:
        The charts of all networks below one another; None where not more than one setting was tried.
    """
    settings = {tuple(row["settings"].get(name) for name in ("guidance", "steps", "sampler")) for row in rows}
    if len(settings) < 2:
        return None
    charts = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        by_steps = len({scale for scale, *_ in settings}) == 1  # then there is nothing to see against the guidance
        charts += [_chart(own, key, by_steps) for key in CHARTED if all(key in row["figures"] for row in own)]
    if not charts:
        return None
    whole = Image.new("RGB", (max(chart.width for chart in charts), sum(chart.height for chart in charts)), "#ffffff")
    top = 0
    for chart in charts:
        whole.paste(chart, (0, top))
        top += chart.height
    return whole


def _chart(rows: Sequence[Mapping[str, Any]], key: str, by_steps: bool) -> Image.Image:
    across, lines = ("steps", "guidance") if by_steps else ("guidance", "steps")
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        settings = row["settings"]
        name = f"guidance {settings[lines]:g}" if by_steps else f"{settings[lines]} steps"
        place, sampler = float(settings[across]), settings.get("sampler")
        if sampler is not None:
            name = sampler if by_steps else f"{sampler}, {name}"
            place = place * 2 - 1 if by_steps and sampler == "heun" else place
        series.setdefault(name, []).append((place, row["figures"][key]))
    counted = "evaluations of the network" if "sampler" in rows[0]["settings"] else "number of steps"
    title = counted if by_steps else "guidance scale"
    # the font of charts has no accents
    label = unicodedata.normalize("NFKD", rows[0]["labels"].get(key, key)).encode("ascii", "ignore").decode()
    lines = {name: sorted(line) for name, line in series.items()}
    # shares have their whole range, and a distance starts from 0, so that small differences look small
    highest = 1.0 if key in ("precision", "recall") else max(row["figures"][key] for row in rows)
    within = (0.0, highest) if highest > 0 else None
    return line_chart(lines, across=title, up=label, points=True, within=within)
