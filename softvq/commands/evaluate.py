"""Figures about a model: `softvq evaluate probe`, `softvq evaluate latents`."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

import softvq
from softvq.backbones import FrozenBackbone, load_backbone
from softvq.commands.common import (
    Photos,
    batched,
    check_output,
    choose_size,
    finite_images,
    load_tokenizer,
    machine_name,
    messages,
    precision_of,
    results,
)
from softvq.data.folder import DataConfig, PhotoFolder
from softvq.data.images import to_image
from softvq.errors import InputError, RunError
from softvq.evaluation.features import pooled_features
from softvq.evaluation.latent_report import Gathered, has_codewords
from softvq.evaluation.latent_sections import FEWEST_PHOTOS, latent_study, summary_of
from softvq.evaluation.probe_page import Probed, probe_page
from softvq.evaluation.probing import (
    Labelled,
    ProbeResult,
    evenly,
    generator_features,
    keys_of_names,
    parse_features,
    probe_classes,
    tokenizer_features,
)
from softvq.evaluation.report import report_page
from softvq.files import write_json, write_text
from softvq.generators.generator import LatentGenerator
from softvq.generators.mar import MAR
from softvq.pipeline import check_tokenizer
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.distributed import choose_device

__all__ = ["latents", "probe"]

THUMBNAIL_PX, PIXELS_PX = 96, 8


@torch.no_grad()
def probe(arguments: argparse.Namespace) -> None:
    """Print, and perhaps save, how well classes can be told from what models make of photographs."""
    _, layer = parse_features(arguments.on)
    if (layer is None) != (arguments.generator is None):
        raise InputError("--generator DIR and --on generator:LAYER belong together; give both or neither")
    models: list[str] = arguments.model
    twice = [name for number, name in enumerate(models) if name in models[:number]]
    if twice:
        raise InputError(f"MODEL {twice[0]} is there twice; give each once")
    if arguments.generator is not None and len(models) > 1:
        raise InputError(f"--generator is of one tokenizer, but there are {len(models)} MODELs; give one")
    if arguments.out is not None:
        check_output(Path(arguments.out), arguments.overwrite)
    device = choose_device(arguments.device)
    # all of them first, so that no misspelt one is found when others have taken their hours
    tokenizers = [load_tokenizer(name, torch.device("cpu")) for name in models]
    sizes = [_size(arguments, tokenizer) for tokenizer in tokenizers]
    probed, reports, classes = [], [], []
    for name, tokenizer, size in zip(models, tokenizers, sizes, strict=True):
        result, report, classes = _probed(arguments, name, tokenizer.to(device), size)
        tokenizer.cpu()
        learned = report["data"]["train"]["photographs"]
        title = f"{arguments.on}, {learned} training photographs"
        _print_probe(title if len(models) == 1 else f"{name}: {title}", result)
        probed.append(Probed(model=name, on=arguments.on, result=result, learned=learned))
        reports.append(report)
    if arguments.out is None:
        return
    write_json(Path(arguments.out) / "probe.json", reports if len(reports) > 1 else reports[0])
    write_text(Path(arguments.out) / "probe.html", probe_page(probed, classes, _probe_facts(reports)))
    results().print(f"{arguments.out}: probe.html, probe.json", soft_wrap=True)


def _probed(
    arguments: argparse.Namespace, model: str, tokenizer: ImageTokenizer, size: tuple[int, int]
) -> tuple[ProbeResult, dict[str, Any], list[str]]:
    """Return what is found about one model, the same as plain data, and the names of the classes."""
    kind, layer = parse_features(arguments.on)
    device = tokenizer.latent_mean.device
    generator = None
    if arguments.generator is not None:
        generator = LatentGenerator.from_pretrained(arguments.generator).to(device).eval()
        check_tokenizer(generator, tokenizer)

    def features(images: Tensor, keys: Tensor) -> Tensor:
        with precision_of(device, arguments.precision):
            if generator is None or layer is None:
                return tokenizer_features(tokenizer, images, kind)
            latents = tokenizer.encode(images.to(device))[:, : generator.config.num_tokens].float()
            return generator_features(generator, latents, layer, keys, time=arguments.time)

    most, workers = arguments.images, arguments.workers
    train, val = (_Chosen(path, size, tokenizer, most, workers) for path in _splits(arguments))
    _check_classes(train.folder, val.folder)
    classes = train.folder.classes
    teach, judge = (_labelled(each, classes, features, arguments.batch_size) for each in (train, val))
    result = probe_classes(teach, judge, len(classes), neighbours=arguments.knn)
    report = {"on": arguments.on, **result.as_dict(), **_provenance(model, arguments.precision, tokenizer, size)}
    if generator is not None:
        time = None if isinstance(generator.network, MAR) else arguments.time
        report["generator"] = {"model": arguments.generator, "fingerprint": generator.fingerprint(), "time": time}
    report["data"] = {"train": train.provenance(), "val": val.provenance()}
    return result, report, classes


def _probe_facts(reports: list[dict[str, Any]]) -> dict[str, str]:
    """Return what a reader of the page needs to get it again."""
    facts = {}
    for number, report in enumerate(reports, 1):
        which = f" {number}" if len(reports) > 1 else ""
        height, width = report["size"]
        facts[f"Model{which}"] = f"{report['model']}, {report['tokenizer']}, {height} x {width} pixels"
    first = reports[0]
    if "generator" in first:
        facts["Generator"] = f"{first['generator']['model']}, {first['generator']['fingerprint']}"
    for name, split in (("train", "Learned from"), ("val", "Judged by")):
        data = first["data"][name]
        facts[split] = f"{data['path']}: {data['photographs']} of {data['found']}, {data['fingerprint']}"
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return {**facts, "Precision": first["precision"], "Machine": first["machine"], "Versions": versions}


@torch.no_grad()
def latents(arguments: argparse.Namespace) -> None:
    """Write a report about the latents of photographs: `report.json`, and a page with pictures."""
    out = Path(arguments.out)
    check_output(out, arguments.overwrite)
    device = choose_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model, device)
    size = _size(arguments, tokenizer)
    if all((Path(arguments.data) / name).is_dir() for name in ("train", "val")):
        raise InputError(f"{arguments.data}: holds train and val; give one of them")
    chosen = _Chosen(Path(arguments.data), size, tokenizer, arguments.images, arguments.workers)
    if len(chosen.photos.paths) < FEWEST_PHOTOS:
        raise InputError(f"{arguments.data}: {_count(chosen)}, expected at least {FEWEST_PHOTOS}")
    backbone = _backbone(arguments.features, size[0])
    backbone = None if backbone is None else backbone.to(device)
    data, thumbnails, indices = _gathered(chosen, tokenizer, backbone, arguments)

    def decode(latents: Tensor) -> Tensor:
        found = []
        for part in latents.split(arguments.batch_size):
            with precision_of(device, arguments.precision):
                found.append(finite_images(tokenizer.decode(part.to(device), size)))
        return torch.cat(found)

    report, sections = latent_study(tokenizer, data, thumbnails, indices, decode)
    origin = _provenance(arguments.model, arguments.precision, tokenizer, size)
    origin |= {"data": chosen.provenance(), "features": arguments.features}
    write_json(out / "report.json", {**report, **origin})
    summary = summary_of(report)
    facts = {
        "Model": arguments.model,
        "Fingerprint": origin["tokenizer"],
        "Photographs": f"{arguments.data}: {_count(chosen)} of {len(chosen.folder)}",
        "Size": f"{size[0]} x {size[1]} pixels, {origin['precision']}",
        "Machine": origin["machine"],
        "Versions": ", ".join(f"{name} {version}" for name, version in origin["versions"].items()),
    }
    tokens, dim = data.latents.shape[1:]
    lead = f"{len(data.names)} photographs as {tokens} tokens of {dim} numbers, before any generator learns them."
    write_text(out / "report.html", report_page("Latents", lead, summary, sections, facts))
    table = Table("figure", "value")
    for name, value in summary:
        table.add_row(name, value)
    results().print(table)
    results().print(f"{out}: report.html, report.json", soft_wrap=True)


class _Chosen:
    """Some photographs of a folder, spread evenly, with their classes."""

    def __init__(self, path: Path, size: tuple[int, int], tokenizer: ImageTokenizer, most: int, workers: int) -> None:
        data = DataConfig(crop="center", flip=False, cache_megabytes=0)
        self.folder = PhotoFolder(path, size[0], data, seed=0)
        patch_size = tokenizer.config.patch_size
        self.photos = Photos(source=Path(path), size=size, patch_size=patch_size, console=messages(), workers=workers)
        self.photos.paths = [Path(path) / self.folder.names[i] for i in evenly(len(self.folder), most)]
        self.labels = dict(zip(self.folder.names, self.folder.labels, strict=True))

    def batches(self, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        return batched(self.photos, batch_size)

    def provenance(self) -> dict[str, Any]:
        return {
            "path": str(self.folder.root),
            "fingerprint": self.folder.fingerprint,
            "photographs": len(self.photos.paths) - len(self.photos.skipped),
            "found": len(self.folder),
            "skipped": self.photos.skipped,
            "classes": self.folder.classes,
        }


def _count(chosen: _Chosen) -> str:
    count = len(chosen.photos.paths) - len(chosen.photos.skipped)
    return f"{count} photograph{'s' * (count != 1)}"


def _size(arguments: argparse.Namespace, tokenizer: ImageTokenizer) -> tuple[int, int]:
    size = choose_size(None if arguments.size is None else str(arguments.size), tokenizer)
    assert size is not None  # it is no `native`
    return size


def _splits(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folders to learn from and to be judged by."""
    data = Path(arguments.data)
    if arguments.val is not None:
        return data / "train" if (data / "train").is_dir() else data, Path(arguments.val)
    missing = [name for name in ("train", "val") if not (data / name).is_dir()]
    if missing:
        raise InputError(f"{data}: holds no folder {missing[0]}; give DATA with train and val, or --val DIR as well")
    return data / "train", data / "val"


def _check_classes(train: PhotoFolder, val: PhotoFolder) -> None:
    for folder in (train, val):
        if not folder.classes:
            raise InputError(f"{folder.root}: has no classes, expected a subfolder for each and no images beside them")
    if len(train.classes) < 2:
        raise InputError(f"{train.root}: has one class, {train.classes[0]}, expected at least 2")
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise InputError(f"{val.root}: has the class {unknown[0]}, which {train.root} has not; give the same classes")


def _labelled(
    chosen: _Chosen, classes: list[str], features: Callable[[Tensor, Tensor], Tensor], batch_size: int
) -> Labelled:
    names: list[str] = []
    rows: list[Tensor] = []
    for batch, images in chosen.batches(batch_size):
        rows.append(features(images, keys_of_names(batch)))
        names += batch
    labels = torch.tensor([classes.index(chosen.folder.classes[chosen.labels[name]]) for name in names])
    whole = torch.cat(rows)
    _check_finite(whole)
    return Labelled(features=whole, labels=labels, keys=keys_of_names(names))


def _gathered(
    chosen: _Chosen, tokenizer: ImageTokenizer, backbone: FrozenBackbone | None, arguments: argparse.Namespace
) -> tuple[Gathered, list[Image.Image], Tensor | None]:
    device, names = tokenizer.latent_mean.device, []
    codes, encoder, pixels, rows, thumbnails = [], [], [], [], []
    for batch, images in chosen.batches(arguments.batch_size):
        with precision_of(device, arguments.precision):
            found = tokenizer.encode(images.to(device))
            codes += [tokenizer.encode_indices(images.to(device)).cpu()] if has_codewords(tokenizer) else []
        rows.append(found.double().cpu())
        encoder += [] if backbone is None else [pooled_features(backbone, [images]).double()]
        small = torch.nn.functional.interpolate(images, size=(PIXELS_PX, PIXELS_PX), mode="area")
        pixels.append(small.double().flatten(1))
        thumbnails += [to_image(image).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX) for image in images]
        names += batch
    if len(names) < FEWEST_PHOTOS:
        raise InputError(f"{chosen.folder.root}: {_count(chosen)} can be read, expected at least {FEWEST_PHOTOS}")
    whole = torch.cat(rows)
    _check_finite(whole)
    data = Gathered(
        names=tuple(names),
        latents=whole,
        keys=keys_of_names(names),
        labels=torch.tensor([chosen.labels[name] for name in names]),
        classes=tuple(chosen.folder.classes),
        pixels=torch.cat(pixels),
        encoder=torch.cat(encoder) if encoder else None,
    )
    return data, thumbnails, torch.cat(codes) if codes else None


def _backbone(features: list[str] | None, size: int) -> FrozenBackbone | None:
    if features is None:
        return None
    if len(features) > 2:
        raise InputError(f"--features has {len(features)} parts, expected a timm model and perhaps its weights")
    return load_backbone(features[0], image_size=size, weights=features[1] if len(features) > 1 else None)


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise RunError("the model gives values that are not finite; try --precision float32, or another model")


def _provenance(model: str, precision: str, tokenizer: ImageTokenizer, size: tuple[int, int]) -> dict[str, Any]:
    return {
        "model": model,
        "tokenizer": tokenizer.fingerprint(),
        "size": list(size),
        "precision": precision,
        "machine": machine_name(tokenizer.latent_mean.device),
        "versions": {"softvq": softvq.__version__, "torch": torch.__version__},
    }


def _print_probe(title: str, result: ProbeResult) -> None:
    table = Table("classifier", "accuracy", "95 % interval", "right", title=title)
    names = {"linear": f"linear probe, l2 {result.l2:g}", "knn": f"{result.neighbours} nearest neighbours"}
    names["majority"] = "the commonest class"
    for key, name in names.items():
        score = getattr(result, key)
        low, high = score.as_dict()["interval_95"]
        table.add_row(name, f"{score.accuracy:.4f}", f"{low:.4f} to {high:.4f}", f"{score.correct} of {score.total}")
    results().print(table)
