"""The page about generated images: their figures, the images, a sweep, and the photographs they are nearest to."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from softvq.evaluation.generation import NEAREST, Nearest, best_of, picture_grid, setting_name
from softvq.evaluation.image_sets import ImageSet, picked
from softvq.evaluation.report import Section, report_page
from softvq.evaluation.set_figures import DEVIATION

__all__ = ["generation_page", "nearest_picture"]

TILES = ("frechet_distance", "inception_score", "precision", "recall")
MIN_PICTURE_PX = 96


def nearest_picture(
    samples: UInt8[Tensor, "image 3 height width"], reference: ImageSet, nearest: Nearest
) -> Image.Image:
    """Draw samples with the reference images that are nearest to them, a row for each.

    Args:
        samples: The first of the set, at least as many as `nearest` has rows.
        reference: Where the nearest lie; read up to the last of them.
        nearest: Distances and places.

    Returns:
        An RGB image on white.
    """
    wanted = sorted(set(nearest.places.flatten().tolist()))
    pixels, names = [], []
    for batch in picked(reference, wanted).batches(len(wanted)):
        pixels.append(batch.pixels)
        names += batch.names
    found = dict(zip(wanted, zip(torch.cat(pixels), names, strict=True), strict=True))
    pictures, captions = [], []
    for number, (distances, places) in enumerate(zip(nearest.distances.tolist(), nearest.places.tolist(), strict=True)):
        pictures.append(samples[number])
        captions.append(f"sample {number + 1}")
        for distance, place in zip(distances, places, strict=True):
            pictures.append(found[place][0])
            captions.append(f"{distance:.3f} {found[place][1]}")
    larger = math.ceil(MIN_PICTURE_PX / samples.shape[3])  # so that captions have room
    enlarged = torch.stack(pictures).repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    return picture_grid(enlarged, 1 + nearest.places.shape[1], captions)


def generation_page(
    result: Mapping[str, Any],
    samples: Image.Image,
    sweep: Image.Image | None = None,
    nearest: Image.Image | None = None,
) -> str:
    """Return the page of a report on generated images.

    Args:
        result: As it is in generation.json.
        samples: A grid of images.
        sweep: Charts of the figures over the settings, where there are several.
        nearest: Samples with the nearest photographs of the reference.

    Returns:
        The text of a self-contained HTML file.
    """
    rows, origin = result["rows"], result["provenance"]
    best = best_of(rows)
    count, reference = origin["samples"][0]["count"], origin["reference"]["source"]
    lead = f"{count} images compared with {reference}, protocol {result['protocol']}: {origin['about']}."
    summary = [(_label(best, key), _number(best["figures"], key)) for key in TILES if key in best["figures"]]
    if "frechet_distance" in best["ratios"]:
        summary.append(("times the validation photographs'", f"{best['ratios']['frechet_distance']:.3f}"))
    text = "The first of them" if not best["settings"] else f"The first of those with {setting_name(best['settings'])}"
    if len(rows) > 1 and best["settings"] and sweep is not None:
        text += ", the setting with the smallest distance"
    sections = [Section(title="Samples", text=f"{text}.", picture=samples, caption="samples")]
    if sweep is not None:
        why = "Every point is a whole set of images; between the points nothing was measured."
        sections.append(Section(title="Settings", text=why, picture=sweep, caption="figures over the settings"))
    if nearest is not None:
        sections.append(_nearest(result, best, nearest))
    sections += [_figures(row, result["validation"] or ()) for row in rows]
    return report_page("Generated images", lead, summary, sections, _facts(result))


def _nearest(result: Mapping[str, Any], best: Mapping[str, Any], picture: Image.Image) -> Section:
    text = (
        "On the left samples, beside each the images of the reference that are nearest to it by the angle between the "
        f"features of {best['network']}, with 1 - cos. Samples that are much nearer than photographs of a validation "
        "set have been learned by heart."
    )
    values = [(name, row["figures"]) for name, row in (("samples", best), *_beside(result["validation"], best))]
    rows = [(f"median of {name}", _number(figures, NEAREST)) for name, figures in values if NEAREST in figures]
    return Section(
        title="Nearest reference images",
        text=text,
        picture=picture,
        caption="samples and what they resemble",
        rows=rows,
    )


def _figures(row: Mapping[str, Any], validation: Sequence[Mapping[str, Any]]) -> Section:
    own = next((other["figures"] for _, other in _beside(validation, row)), {})
    lines = []
    for key in row["figures"]:
        if key.endswith(DEVIATION):
            continue
        text = _number(row["figures"], key)
        if key in own:
            text += f"; of validation photographs {_number(own, key)}"
        if key in row["ratios"]:
            text += f"; ratio {row['ratios'][key]:.3f}"
        lines.append((_label(row, key), text))
    remarks = " ".join(f"{warning}." for warning in row["warnings"])
    return Section(title=f"Figures: {row['name']}", text=remarks or "Nothing is to be minded.", rows=lines)


def _beside(
    validation: Sequence[Mapping[str, Any]] | None, row: Mapping[str, Any]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the row of the validation photographs for the network of a row, if there is one."""
    return [("validation photographs", other) for other in validation or () if other["network"] == row["network"]]


def _label(row: Mapping[str, Any], key: str) -> str:
    return str(row["labels"].get(key, key.replace("_", " ")))


def _number(figures: Mapping[str, float], key: str) -> str:
    deviation = figures.get(key + DEVIATION)
    return f"{figures[key]:.5g}" + ("" if deviation is None else f" ± {deviation:.2g}")


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    origin = result["provenance"]
    facts = {"Protocol": f"{origin['protocol']}: {origin['about']}"}
    if origin["model"] is not None:
        facts["Model"] = ", ".join(f"{key} {value}" for key, value in origin["model"].items() if value is not None)
    if origin["recipe"] is not None:
        facts["Recipe"] = json.dumps(origin["recipe"])
    sets = {f"Samples {number}": about for number, about in enumerate(origin["samples"], 1)}
    sets |= {"Reference": origin["reference"]}
    if origin["validation"] is not None:
        sets["Validation"] = origin["validation"]
    for name, about in sets.items():
        facts[name] = ", ".join(f"{key} {_plain(value)}" for key, value in about.items() if value is not None)
    for network in origin["extractors"]:
        facts[network["name"]] = f"sha256 {network['sha256']}, {network['resize']}"
    facts["Machine"] = origin["machine"]
    facts["Versions"] = ", ".join(f"{name} {value}" for name, value in origin["versions"].items())
    return facts


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
