"""Photographs to latent files and back: `softvq encode`, `softvq decode`, `softvq reconstruct`."""

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from softvq import __version__
from softvq.commands.common import (
    batched,
    check_output,
    finite_images,
    load_tokenizer,
    messages,
    open_photos,
    precision_of,
    progress,
    results,
    round_trip,
)
from softvq.data.images import SUFFIXES, to_image
from softvq.data.latents import LatentFile, picture_names, read_latents, write_latents
from softvq.errors import InputError
from softvq.evaluation.page import Reconstruction, measure
from softvq.evaluation.pictures import side_by_side
from softvq.files import replacing, write_json
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.distributed import choose_device

__all__ = ["decode", "encode", "reconstruct"]

CONTACT_SHEET_PHOTOS = 24
TABLE_ROWS = 50
METRICS = ("psnr", "ssim", "mean_colour_psnr")


@torch.inference_mode()
def encode(arguments: argparse.Namespace) -> None:
    """Write the latents of a photograph, or of all in a folder, to one latent file."""
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: is to be a latent file, give a name that ends in .safetensors")
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the name of a file")
    check_output(out, arguments.overwrite)
    device = choose_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model, device)
    photos = open_photos(arguments, tokenizer)
    dtype = {"float16": torch.float16, "float32": torch.float32}[arguments.dtype]
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    latents: list[Tensor] = []
    for batch, images in batched(photos, arguments.batch_size):
        with precision_of(device, arguments.precision):
            latents.append(tokenizer.encode(images.to(device)).to("cpu", dtype))
        names += batch
        sizes += [(images.shape[2], images.shape[3])] * len(batch)
    content = LatentFile(
        latents=torch.cat(latents),
        names=tuple(names),
        sizes=torch.tensor(sizes),
        fingerprint=tokenizer.latent_fingerprint(),
        softvq_version=__version__,
    )
    write_latents(out, content)
    count, tokens, dim = content.latents.shape
    results().print(f"{out}: {count} x {tokens} tokens x {dim} in {arguments.dtype}", soft_wrap=True)


@torch.inference_mode()
def decode(arguments: argparse.Namespace) -> None:
    """Write one PNG file per image of a latent file."""
    out = Path(arguments.out)
    _check_folder(out, arguments.overwrite)
    device = choose_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model, device)
    content = read_latents(arguments.latents, tokenizer.latent_fingerprint())
    _check_shapes(arguments.latents, content, tokenizer)
    files = picture_names(content.names)
    chunks = list(_chunks(content.sizes.tolist(), arguments.batch_size))
    for chunk in progress(chunks, "images", messages()):
        height, width = content.sizes[chunk.start].tolist()
        with precision_of(device, arguments.precision):
            images = tokenizer.decode(content.latents[chunk].to(device, torch.float32), (height, width))
        for file, image in zip(files[chunk], finite_images(images), strict=True):
            _save(to_image(image), out / file)
    results().print(f"{out}: {len(files)} PNG files", soft_wrap=True)


@torch.inference_mode()
def reconstruct(arguments: argparse.Namespace) -> None:
    """Write each photograph beside its reconstruction, a contact sheet of a folder, and a table of PSNR and SSIM."""
    out = Path(arguments.out)
    _check_folder(out, arguments.overwrite)
    device = choose_device(arguments.device)
    tokenizer = load_tokenizer(arguments.model, device)
    photos = open_photos(arguments, tokenizer)
    is_folder = photos.source.is_dir()
    pictures = out / "pairs" if is_folder else out
    files = {name: pictures / file for name, file in zip(photos.names, picture_names(photos.names), strict=True)}
    _spare_originals(photos.paths, [*files.values(), out / "contact-sheet.png"])
    rows: list[dict[str, Any]] = []
    sheet: list[Reconstruction] = []
    for names, images in batched(photos, arguments.batch_size):
        copies = round_trip(tokenizer, images, arguments.precision)
        for item in measure(images, copies, names, tokenizer.config.num_latent_tokens, tokenizer.config.latent_dim):
            rows.append(_figures(item))
            _save(_draw([item]), files[item.name])
            sheet += [item] if len(sheet) < CONTACT_SHEET_PHOTOS else []
    if is_folder:
        _save(_draw(sheet), out / "contact-sheet.png")
    mean = {name: statistics.fmean(row[name] for row in rows) for name in METRICS}
    report = {"tokenizer": tokenizer.fingerprint(), "mean": _finite(mean)}
    report |= {"photographs": [_finite(row) for row in rows], "skipped": photos.skipped}
    write_json(out / "metrics.json", report)
    _print_table(rows, mean)
    results().print(
        f"{out}: {len(rows)} photograph{'s' * (len(rows) > 1)} beside reconstructions, metrics.json", soft_wrap=True
    )


def _figures(item: Reconstruction) -> dict[str, Any]:
    width, height = item.original.size
    return {"name": item.name, "height": height, "width": width, **{name: getattr(item, name) for name in METRICS}}


def _draw(items: list[Reconstruction]) -> Image.Image:
    captions = [f"{item.name}  {item.psnr:.2f} dB" for item in items]
    return side_by_side([item.original for item in items], [item.reconstruction for item in items], captions)


def _print_table(rows: list[dict[str, Any]], mean: dict[str, float]) -> None:
    table = Table("photograph", "height x width", "PSNR in dB", "SSIM", "mean colour in dB")
    for row in rows[:TABLE_ROWS]:
        size = f"{row['height']} x {row['width']}"
        table.add_row(row["name"], size, *_cells(row))
    if len(rows) > TABLE_ROWS:
        table.add_row(f"and {len(rows) - TABLE_ROWS} more")
    table.add_section()
    table.add_row(f"mean of {len(rows)}", "", *_cells(mean))
    results().print(table)


def _cells(figures: dict[str, Any]) -> tuple[str, str, str]:
    return f"{figures['psnr']:.2f}", f"{figures['ssim']:.3f}", f"{figures['mean_colour_psnr']:.2f}"


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which is the PSNR of an exact reconstruction."""
    return {key: None if value == math.inf else value for key, value in figures.items()}


def _spare_originals(originals: list[Path], pictures: list[Path]) -> None:
    """Refuse to replace a photograph by what is made of it, whatever `--overwrite` says."""
    taken = {path.resolve() for path in originals}
    for picture in pictures:
        if picture.resolve() in taken:
            raise InputError(f"{picture}: is one of the photographs themselves; give another folder to write to")


def _check_folder(out: Path, overwrite: bool) -> None:
    if out.is_file() or out.suffix.lower() in SUFFIXES:
        raise InputError(f"{out}: is to be a folder of pictures; give the name of one")
    check_output(out, overwrite)


def _check_shapes(path: str, content: LatentFile, tokenizer: ImageTokenizer) -> None:
    config = tokenizer.config
    expected = [config.num_latent_tokens, config.latent_dim]
    if list(content.latents.shape[1:]) != expected:
        found = list(content.latents.shape[1:])
        raise InputError(f"{path}: latents are {found} for each image, the model has {expected}; encode again with it")
    for name, (height, width) in zip(content.names, content.sizes.tolist(), strict=True):
        if height % config.patch_size or width % config.patch_size:
            raise InputError(
                f"{path}: the size of {name!r} is {height}x{width}, expected multiples of {config.patch_size}; "
                "encode it again"
            )


def _chunks(sizes: list[list[int]], batch_size: int) -> Iterator[slice]:
    """Cut a row of images into slices of one size, at most `batch_size` long."""
    start = 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or end - start == batch_size or sizes[end] != sizes[start]:
            yield slice(start, end)
            start = end


def _save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary)
