"""Figures about generated images: `softvq evaluate generation`."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from softvq.commands.common import machine_name, results
from softvq.commands.evaluate_shared import bar_of_rank, check_report, networks_of, print_figures
from softvq.commands.judged_samples import open_samples
from softvq.errors import InputError
from softvq.evaluation.adm_statistics import adm_statistics, is_adm_statistics, with_images
from softvq.evaluation.extractors import Extractor
from softvq.evaluation.generation import (
    NEAREST,
    FirstPictures,
    Nearest,
    best_of,
    nearest_references,
    picture_grid,
    ratios,
    setting_name,
    sweep_charts,
)
from softvq.evaluation.generation_report import generation_page, nearest_picture
from softvq.evaluation.image_sets import ImageBatch, ImageSet, open_images, picked
from softvq.evaluation.kept_features import kept_features
from softvq.evaluation.probing import evenly
from softvq.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    check_different,
    check_protocol,
    described,
    provenance,
)
from softvq.evaluation.set_features import SetFeatures, set_features, thinned
from softvq.evaluation.set_figures import set_figures
from softvq.files import replacing, write_json, write_text
from softvq.ranks import is_main, world_size
from softvq.training.distributed import choose_device, join, leave

__all__ = ["generation"]

PICTURES = ("samples.png", "sweep.png", "nearest.png")
PRECISIONS: dict[str, Literal["fp32", "bf16"]] = {"float32": "fp32", "bf16": "bf16", "fp8": "bf16"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Reference:
    """What samples are compared with: images, statistics, or both in one file."""

    images: ImageSet | None
    statistics: SetFeatures | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """What was found about one set."""

    rows: list[dict[str, Any]]
    about: dict[str, Any]
    first: Tensor
    nearest: Nearest | None


def generation(arguments: argparse.Namespace) -> None:
    """Compare generated images with photographs, and write a report."""
    out = Path(arguments.out)
    check_report(out, arguments.overwrite, arguments.samples, arguments.reference, arguments.validation)
    device = choose_device(arguments.device)
    join(device)
    try:
        _evaluate(arguments, device, out)
    finally:
        leave()


@torch.no_grad()
def _evaluate(arguments: argparse.Namespace, device: torch.device, out: Path) -> None:
    protocol = PROTOCOLS[arguments.protocol]
    samples = open_samples(arguments, device)
    networks = networks_of(arguments.features, device, protocol.name)
    if not networks:
        raise InputError(
            "--features names no network to compare images with; give one, such as inception=FILE or lite0"
        )
    size = samples.sets[0].size
    reference = _reference(arguments, protocol, size, networks)
    validation, remarks = _validation(arguments, protocol, samples.sets[0])
    against = reference.statistics or reference.images
    assert against is not None
    checked = [
        check_protocol(protocol, what="generation", samples=images, reference=against, networks=networks)
        for images in samples.sets
    ]
    remarks += [*checked[0], *samples.remarks]
    if samples.pipeline is not None:
        samples.pipeline.to(device, PRECISIONS[arguments.precision])
        if arguments.compile or arguments.precision == "fp8":
            samples.pipeline.compile(fp8=arguments.precision == "fp8")
    known = _seen_reference(arguments, reference, networks)
    own = None
    if validation is not None:
        own = _judged(arguments, validation, "validation photographs", {}, known, networks)
    found: list[_Judged] = []
    for images, settings in zip(samples.sets, samples.settings, strict=True):
        even = images.count if validation is None else validation.count
        found.append(_judged(arguments, images, setting_name(settings), settings, known, networks, even))
    if not is_main():
        return
    for judged in found:
        same = own is not None and judged.about["pixels"] == own.about["pixels"]
        told = [f"{arguments.validation}: holds the same images as the samples, which explains ratios of 1"] * same
        _add_ratios(judged, own)
        for row in judged.rows:
            row["warnings"][:0] = [*remarks, *told]
    record = provenance(
        protocol,
        networks=networks,
        samples=[judged.about for judged in found],
        reference=described(known[0]),
        machine=machine_name(device),
        model=samples.model,
        recipe=samples.recipe,
        validation=None if own is None else own.about,
    )
    record["command"] = {"precision": arguments.precision, "batch_size": arguments.batch_size, "ranks": world_size()}
    _write(out, found, own, record, reference.images)


def _reference(
    arguments: argparse.Namespace, protocol: Protocol, size: tuple[int, int], networks: Sequence[Extractor]
) -> _Reference:
    source = arguments.reference
    if not is_adm_statistics(source):
        return _Reference(images=_photographs(arguments, protocol, source, size), statistics=None)
    if len(networks) != 1:
        raise InputError(
            f"{source}: holds statistics of one network, but --features has {len(networks)}; give the one they are of"
        )
    statistics = adm_statistics(source, networks[0])
    return _Reference(images=open_images(source) if statistics.count else None, statistics=statistics)


def _photographs(arguments: argparse.Namespace, protocol: Protocol, source: str, size: tuple[int, int]) -> ImageSet:
    """Open photographs, cropped to the size of the samples where that was asked for or belongs to the protocol."""
    if arguments.crop or (protocol.size is not None and Path(source).is_dir()):
        if size[0] != size[1]:
            raise InputError(f"--crop makes squares, but the samples are {_by(size)} (height x width); leave it out")
        return open_images(source, size=size[0], crop=True)
    images = open_images(source)
    if images.size != size:
        raise InputError(
            f"{source}: images are {_by(images.size)} (height x width), the samples {_by(size)}; give --crop to cut "
            "photographs to the size of the samples, or images of that size"
        )
    return images


def _validation(
    arguments: argparse.Namespace, protocol: Protocol, samples: ImageSet
) -> tuple[ImageSet | None, list[str]]:
    """Open the validation photographs, and of too many take as many as there are samples."""
    if arguments.validation is None:
        return None, []
    images = _photographs(arguments, protocol, arguments.validation, samples.size)
    if images.count > samples.count:
        remark = (
            f"{images.source}: {samples.count} of its {images.count} photographs, evenly spread, are taken, as many as "
            "there are samples"
        )
        return picked(images, evenly(images.count, samples.count)), [remark]
    if images.count < samples.count:
        return images, [
            f"{images.source}: holds {images.count} photographs for {samples.count} samples; since distances fall with "
            f"the number of images, ratios are of {images.count} samples, evenly spread"
        ]
    return images, []


def _seen_reference(
    arguments: argparse.Namespace, reference: _Reference, networks: Sequence[Extractor]
) -> list[SetFeatures]:
    seen, images = None, reference.images
    if images is not None and arguments.keep_features is not None:
        if world_size() > 1:
            raise InputError(f"--keep-features is for one process, but there are {world_size()}; leave it out")
        look = functools.partial(_seen, arguments, images, "reference", networks)
        seen = kept_features(images, networks, Path(arguments.keep_features), look)
    elif images is not None:
        seen = _seen(arguments, images, "reference", networks)
    if reference.statistics is None:
        assert seen is not None
        return seen
    return [reference.statistics if seen is None else with_images(reference.statistics, seen[0])]


def _seen(
    arguments: argparse.Namespace,
    images: ImageSet,
    label: str,
    networks: Sequence[Extractor],
    keep: Callable[[ImageBatch], Any] | None = None,
) -> list[SetFeatures]:
    """Look at all images of a set, with a bar."""
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    with bar_of_rank(label, images.count) as forward:
        return set_features(images, networks, progress=forward, keep=keep, **options)


def _judged(
    arguments: argparse.Namespace,
    images: ImageSet,
    name: str,
    settings: dict[str, float | str],
    known: Sequence[SetFeatures],
    networks: Sequence[Extractor],
    even: int | None = None,
) -> _Judged:
    """Compare a set with the reference through every network; every rank must call it, the first one has the rows.

    `even` is how many photographs the validation set has: for the ratio to it only so many images count.
    """
    first = FirstPictures(images)
    seen = _seen(arguments, images, name, networks, first)
    pictures = first.over_ranks()
    check_different(seen[0], known[0])  # on every rank, so that all of them end
    judged = _Judged(rows=[], about=described(seen[0]), first=pictures, nearest=None)
    if not is_main():
        return judged
    nearest = []
    for network, ours, theirs in zip(networks, seen, known, strict=True):
        figures = set_figures(theirs, ours, network)
        row = {
            "name": name if len(networks) == 1 else f"{name}, {network.name}",
            "network": network.name,
            "settings": settings,
            "figures": dict(figures.values),
            "labels": dict(figures.labels),
            "warnings": list(figures.warnings),
        }
        if even is not None and even < ours.count:
            part = thinned(ours, evenly(ours.count, even))
            row["even"] = {} if part is None else set_figures(theirs, part, network).values
        nearest.append(nearest_references(ours, theirs))
        if nearest[-1] is not None:
            row["figures"][NEAREST] = nearest[-1].median
            row["labels"][NEAREST] = network.label("median distance to the nearest")
            row["warnings"] += _copies(nearest[-1].copies, ours, theirs)
        judged.rows.append(row)
    return dataclasses.replace(judged, nearest=nearest[0])


def _copies(copies: int, samples: SetFeatures, reference: SetFeatures) -> list[str]:
    """Tell of images that are in the reference as well; a set of nothing else cannot be judged by it."""
    if copies == samples.count:
        raise InputError(
            f"{samples.source}: to {samples.extractor} every image is one of {reference.source}; give images that are "
            "not in the reference"
        )
    if not copies:
        return []
    return [f"{samples.source}: to {samples.extractor} {copies} of its {samples.count} images are in the reference too"]


def _add_ratios(judged: _Judged, validation: _Judged | None) -> None:
    for number, row in enumerate(judged.rows):
        compared = row.pop("even", row["figures"])
        row["ratio_count"] = None if validation is None else min(judged.about["count"], validation.about["count"])
        row["ratios"] = {} if validation is None else ratios(compared, validation.rows[number]["figures"])


def _write(
    out: Path, found: Sequence[_Judged], validation: _Judged | None, record: dict[str, Any], reference: ImageSet | None
) -> None:
    """Write the results and the pictures, and print the figures."""
    rows = [row for judged in found for row in judged.rows]
    own = None if validation is None else validation.rows
    result = {
        "kind": "generation",
        "protocol": record["protocol"],
        "rows": rows,
        "validation": own,
        "provenance": record,
    }
    write_json(out / "generation.json", result)
    chosen = best_of(rows)
    best = next(judged for judged in found if any(row is chosen for row in judged.rows))
    samples = picture_grid(best.first)
    pictures = {"samples.png": samples}
    charts = sweep_charts(rows)
    if charts is not None:
        pictures["sweep.png"] = charts
    if best.nearest is not None and reference is not None:
        pictures["nearest.png"] = nearest_picture(best.first, reference, best.nearest)
    for name in PICTURES:
        if name not in pictures:
            (out / name).unlink(missing_ok=True)  # of an earlier call, which would be taken for this one's
    for name, picture in pictures.items():
        with replacing(out / name) as temporary:
            picture.save(temporary)
    page = generation_page(result, samples, charts, pictures.get("nearest.png"))
    write_text(out / "report.html", page)
    print_figures(rows, own, title=f"{record['samples'][0]['count']} images, {record['protocol']}")
    results().print(f"{out}: report.html, generation.json, {', '.join(pictures)}", soft_wrap=True)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
