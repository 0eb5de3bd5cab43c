"""How near reconstructions are to their photographs: `softvq evaluate reconstruction`."""

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from softvq.commands.common import check_tokens, choose_size, load_tokenizer, machine_name, messages, results
from softvq.commands.evaluate_shared import bar_of_rank, check_report, networks_of, print_figures
from softvq.data.latent_cache import HEADER
from softvq.errors import InputError
from softvq.evaluation import reconstruction_report as report
from softvq.evaluation.adm_statistics import is_adm_statistics
from softvq.evaluation.extractors import Extractor, whole_float32
from softvq.evaluation.image_sets import ImageBatch, ImageSet, open_images, picked
from softvq.evaluation.pair_figures import DISTANCES, LABELS, Distance, figure_names, load_distance
from softvq.evaluation.probing import evenly
from softvq.evaluation.protocols import PROTOCOLS, check_protocol, described, provenance
from softvq.evaluation.reconstruction import Meter, Reconstructions, check_pairs, names_of, rebuilt
from softvq.evaluation.report import report_page
from softvq.evaluation.set_features import set_features
from softvq.evaluation.set_figures import set_figures
from softvq.files import replacing, write_json, write_text
from softvq.inference.accelerate import accelerate
from softvq.ranks import is_main
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.distributed import choose_device, join, leave

__all__ = ["reconstruction"]

NO_MODEL = "-"


def reconstruction(arguments: argparse.Namespace) -> None:
    """Compare photographs with what a tokenizer makes of them, and write a report."""
    out = Path(arguments.out)
    check_report(out, arguments.overwrite, arguments.data, arguments.reconstructions)
    device = choose_device(arguments.device)
    join(device)
    try:
        _evaluate(arguments, device, out)
    finally:
        leave()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """What the command line asks for, opened."""

    pairs: Reconstructions
    tokenizer: ImageTokenizer | None
    distance: Distance | None
    networks: list[Extractor]


@torch.no_grad()
def _evaluate(arguments: argparse.Namespace, device: torch.device, out: Path) -> None:
    tokenizer, pairs = _opened(arguments, device)
    data, protocol = pairs.data, PROTOCOLS[arguments.protocol]
    check = functools.partial(check_protocol, protocol, what="reconstruction", reference=data)
    if "reconstruction" not in protocol.for_what:
        check(samples=data, networks=[])  # before its network is asked for
    given = _Given(
        pairs=pairs,
        tokenizer=tokenizer,
        distance=_distance(arguments.perceptual, data.size, device),
        networks=networks_of(arguments.features, device, arguments.protocol),
    )
    meter = Meter(data.count, figure_names(data.size, given.distance), device)
    made = pairs.measured(meter, given.distance)
    remarks = check(samples=made, networks=given.networks)
    unsure = None if pairs.made is None else check_pairs(data, pairs.made)
    remarks += [] if unsure is None else [unsure]
    with whole_float32(device):
        sets = _measured(arguments, given, made, meter)
        if not is_main():
            return
        if meter.fingerprint("data") == meter.fingerprint("made") and bool(meter.table.any(0)[0]):
            raise InputError(f"{pairs.source}: holds the photographs themselves in another order; give reconstructions")
        images = report.image_row(meter.names, meter.table)
        images["warnings"] += remarks
        kept = arguments.tokens
        latents = [] if tokenizer is None else [report.latent_row(tokenizer, data.size, meter.averages, kept)]
        rows = [images, *latents, *sets]
        for row in rows:
            row["settings"] = {} if kept is None else {"tokens": kept}
        _write(arguments, out, given, meter, rows)


def _opened(arguments: argparse.Namespace, device: torch.device) -> tuple[ImageTokenizer | None, Reconstructions]:
    """Open photographs, and a model or what one made of them."""
    finished = arguments.reconstructions
    if finished is not None and arguments.tokens is not None:
        raise InputError("--tokens is what a MODEL decodes; leave it out with --reconstructions")
    if (finished is None) == (arguments.model == NO_MODEL):
        raise InputError("give either a MODEL, or - in its place and --reconstructions SET, not both")
    tokenizer = made = None
    if finished is None:
        tokenizer = load_tokenizer(arguments.model, device)
        check_tokens(arguments.tokens, tokenizer)
        if arguments.precision == "fp8":
            accelerate(tokenizer, "fp8")
        size = choose_size(None if arguments.size is None else str(arguments.size), tokenizer)
        assert size is not None  # it is no `native`
        data = _images(arguments.data, size[0])
    else:
        made = _images(finished, arguments.size, crop=False)
        is_square = made.size[0] == made.size[1]
        data = _images(arguments.data, made.size[0] if is_square else None, crop=is_square)
        check_pairs(data, made)
    if arguments.images is not None and arguments.images < data.count:
        places = evenly(data.count, arguments.images)
        data, made = picked(data, places), None if made is None else picked(made, places)
    pairs = Reconstructions(
        data=data,
        made=made,
        rebuild=None
        if tokenizer is None
        else functools.partial(rebuilt, tokenizer, precision=arguments.precision, num_tokens=arguments.tokens),
        source=arguments.model if finished is None else finished,
        device=device,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    return tokenizer, pairs


def _images(source: str, size: int | None, crop: bool = True) -> ImageSet:
    path = Path(source)
    if path.suffix.lower() == ".safetensors" or (path / HEADER).is_file():
        raise InputError(f"{path}: holds latents, which are decoded elsewhere; give a folder or an .npz file of images")
    if is_adm_statistics(path):
        raise InputError(f"{path}: holds statistics of a set, and nothing to be compared pair by pair; give the images")
    return open_images(path, size=size, crop=crop)


def _distance(text: str, size: tuple[int, int], device: torch.device) -> Distance | None:
    if text != "auto":
        return load_distance(text, size, device)
    try:
        return load_distance("st-lpips", size, device)
    except InputError as error:
        if is_main():
            messages().print(f"no perceptual distance: {error}", soft_wrap=True)
        return None


def _measured(arguments: argparse.Namespace, given: _Given, made: ImageSet, meter: Meter) -> list[dict[str, Any]]:
    """Look at all photographs and all reconstructions; return a row for each network."""
    data, networks = given.pairs.data, given.networks
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers}

    def keep(batch: ImageBatch) -> None:
        meter.add_digests("made", batch.places, batch.digests)

    reference = []
    if networks:
        with bar_of_rank("photographs", data.count) as forward:
            reference = set_features(data, networks, progress=forward, **options)
    with bar_of_rank("reconstructions", data.count) as forward:
        samples = set_features(made, networks, progress=forward, keep=keep, **options)
    meter.over_ranks()
    rows = []
    for network, ours, theirs in zip(networks, reference, samples, strict=True):
        found = set_figures(ours, theirs, network)
        labels = {key: report.reconstruction_label(label) for key, label in found.labels.items()}
        row = {"name": network.name, "network": network.name, "settings": {}, "figures": found.values}
        rows.append({**row, "labels": labels, "warnings": found.warnings})
    return rows


def _write(arguments: argparse.Namespace, out: Path, given: _Given, meter: Meter, rows: list[dict[str, Any]]) -> None:
    names, table, titles = meter.names, meter.table, names_of(given.pairs.data)
    by = {"psnr": "worst.png"}
    if given.distance is not None:
        by[given.distance.key] = f"worst-{given.distance.name}.png"
    worst = {name: report.worst_places(names, table, name, arguments.worst) for name in by}
    medians = report.median_places(names, table, "psnr", report.SHOWN)
    pictures = given.pairs.pictures([*medians, *(place for places in worst.values() for place in places)])

    def sheet(places: list[int]) -> Image.Image:
        return report.pair_sheet(pictures, places, titles, names, table)

    for name in DISTANCES:  # an earlier report's would be taken for this one's
        (out / f"worst-{name}.png").unlink(missing_ok=True)
    for name, file in by.items():
        with replacing(out / file) as temporary:
            sheet(worst[name]).save(temporary)
    write_text(out / "images.csv", report.figures_table(titles, names, table))
    origin = _provenance(arguments, given, meter)
    result: dict[str, Any] = {
        "kind": "reconstruction",
        "protocol": arguments.protocol,
        "rows": rows,
        "validation": None,
        "provenance": origin,
        "worst": report.worst_rows(titles, names, table, worst["psnr"]),
        "worst_perceptual": None,
    }
    if given.distance is not None:
        result["worst_perceptual"] = report.worst_rows(titles, names, table, worst[given.distance.key])
    write_json(out / "reconstruction.json", result)
    sheets = {f"The worst by {LABELS[name]}": sheet(worst[name][: report.SHOWN]) for name in by}
    sheets["In the middle by PSNR"] = sheet(medians)
    sections = report.quality_sections(rows, names, table, sheets)
    lead = f"{len(table):,} photographs beside what {given.pairs.source} makes of them."
    page = report_page("Reconstruction", lead, _summary(rows, len(table)), sections, _facts(origin))
    write_text(out / "report.html", page)
    _print(rows)
    files = ["report.html", "reconstruction.json", "images.csv", *by.values()]
    results().print(f"{out}: {', '.join(files)}", soft_wrap=True)


def _provenance(arguments: argparse.Namespace, given: _Given, meter: Meter) -> dict[str, Any]:
    data, tokenizer, distance = given.pairs.data, given.tokenizer, given.distance
    samples = {**described(given.pairs.made or data, pixels=meter.fingerprint("made")), "source": given.pairs.source}
    model = None if tokenizer is None else {"name": arguments.model, "fingerprint": tokenizer.fingerprint()}
    origin = provenance(
        PROTOCOLS[arguments.protocol],
        networks=given.networks,
        samples=[samples],
        reference=described(data, pixels=meter.fingerprint("data")),
        machine=machine_name(given.pairs.device),
        model=model,
    )
    origin["precision"] = None if tokenizer is None else arguments.precision
    origin["perceptual"] = None if distance is None else {"name": distance.name, "sha256": distance.sha256}
    return origin


def _summary(rows: Sequence[Mapping[str, Any]], count: int) -> list[tuple[str, str]]:
    """Return the most telling numbers for the top of the page."""
    found = [("Photographs", f"{count:,}")]
    keys = ("psnr", "ssim", "st_lpips", "lpips_vgg", "lpips_alex", "frechet_distance", "bits_per_pixel")
    for row in rows:
        found += [(str(row["labels"][key]), f"{row['figures'][key]:.4g}") for key in keys if key in row["figures"]]
    return found


def _facts(origin: Mapping[str, Any]) -> dict[str, str]:
    """Return in words what a reader needs to get the same page again."""
    reference, samples, model = origin["reference"], origin["samples"][0], origin["model"]
    height, width = reference["size"]
    facts = {"Protocol": f"{origin['protocol']}: {origin['about']}"}
    if model is not None:
        facts |= {"Model": model["name"], "Model's fingerprint": model["fingerprint"], "Precision": origin["precision"]}
    facts["Photographs"] = f"{reference['source']}: {reference['count']:,} of {height} x {width} px"
    facts |= {"Crop": reference["crop"], "Photographs' fingerprint": reference["pixels"]}
    facts |= {"Reconstructions": samples["source"], "Reconstructions' fingerprint": samples["pixels"]}
    for each in origin["extractors"]:
        facts[each["name"]] = f"SHA-256 {each['sha256']}, {each['resize']}"
    if origin["perceptual"] is not None:
        facts[origin["perceptual"]["name"]] = f"SHA-256 {origin['perceptual']['sha256']}"
    facts["Machine"] = origin["machine"]
    facts["Versions"] = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    return facts


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("figure", "mean", "95 % interval of the mean", title="reconstruction")
    pairs = [row for row in rows if row["network"] is None]
    for row in pairs:
        for key, value in row["figures"].items():
            ends = row.get("intervals_95", {}).get(key)
            table.add_row(row["labels"][key], f"{value:.5g}", f"{ends[0]:.5g} to {ends[1]:.5g}" if ends else "")
        table.add_section()
    results().print(table)
    for warning in (warning for row in pairs for warning in row["warnings"]):
        messages().print(f"warning: {warning}", soft_wrap=True)
    sets = [row for row in rows if row["network"] is not None]
    if sets:
        print_figures(sets, title="sets of reconstructions and photographs")
