"""Rate and distortion of the codec, beside JPEG and WebP in files that are no larger.

    python benchmarks/codec.py --model photos-64 --data FOLDER --out OUT

Photographs are centre-cropped to the model's size. For every setting of latents and every photograph JPEG and WebP may
choose among 8 qualities and 9 sizes of the picture, which is enlarged again: of the files that are no larger
than ours, the one with the highest PSNR counts. JPEG's own header takes about 600 bytes, so that it often has no such
file. `fits` says for how many photographs there is one; figures are means over these alone. ST-LPIPS takes most of the
time, so give a GPU, or --perceptual none.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from softvq.codec import CodecConfig, compress, decompress
from softvq.data.images import center_crop, find_images, read_image
from softvq.errors import InputError
from softvq.evaluation.charts import line_chart
from softvq.evaluation.pair_figures import Distance, load_distance, pair_figures
from softvq.files import replacing, write_json
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.distributed import choose_device

FORMATS = ("JPEG", "WebP")
QUALITIES = (0, 2, 5, 10, 20, 35, 50, 75)
SHRINKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)
FIGURES = {"psnr": "PSNR in dB", "ssim": "SSIM", "st_lpips": "ST-LPIPS", "lpips_vgg": "LPIPS (VGG16)"}
BATCH = 16


def settings(model: ImageTokenizer, tokens: Sequence[int], bits: Sequence[int]) -> Iterator[tuple[str, CodecConfig]]:
    """Give what is tried: latents at every number of tokens and bits, and codewords where the quantizer has some."""
    most, least = model.config.num_latent_tokens, model.config.min_latent_tokens or model.config.num_latent_tokens
    for count in [each for each in tokens if least <= each <= most] or [most]:
        for depth in bits:
            yield f"{count} tokens", CodecConfig(tokens=count, bits=depth)
        if hasattr(model.quantizer, "indices"):
            yield f"{count} tokens, codewords", CodecConfig(tokens=count, coder="codewords")
    if hasattr(model.quantizer, "indices"):
        for top in (4, 16):
            yield f"{most} tokens, codewords", CodecConfig(coder="codewords", top=top, bits=4)


def other_files(picture: Image.Image, kind: str) -> list[tuple[int, np.ndarray]]:
    """Return size in bytes and pixels of one picture in every quality and at every scale."""
    found = []
    for shrink in SHRINKS:
        small = [max(1, round(side / shrink)) for side in picture.size]
        shrunk = picture if shrink == 1 else picture.resize(small, Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            buffer = io.BytesIO()
            more = {"optimize": True, "subsampling": "4:2:0"} if kind == "JPEG" else {"method": 6}
            shrunk.save(buffer, kind, quality=quality, **more)
            decoded = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
            if shrink != 1:
                decoded = decoded.resize(picture.size, Image.Resampling.BICUBIC)
            found.append((len(buffer.getvalue()), np.asarray(decoded)))
    return found


def best(picture: Image.Image, files: list[tuple[int, np.ndarray]], most: int) -> tuple[int, np.ndarray] | None:
    """Return the file of the highest PSNR among those of at most so many bytes, if there is one."""
    pixels = np.asarray(picture).astype(np.float32)
    fitting = [file for file in files if file[0] <= most]
    return min(fitting, key=lambda file: float(np.square(file[1] - pixels).mean()), default=None)


def figures(
    originals: Sequence[Image.Image], copies: Sequence[Any], distance: Distance | None, device: torch.device
) -> dict[str, float]:
    """Return the mean of each figure over pairs of pictures."""
    sums: dict[str, float] = {}
    for start in range(0, len(originals), BATCH):
        part = slice(start, start + BATCH)
        pairs = (_stack(each[part]).to(device) for each in (originals, copies))
        found = pair_figures(*pairs, distance)
        for name in FIGURES:
            if name in found:
                sums[name] = sums.get(name, 0.0) + float(found[name].sum())
    return {name: value / len(originals) for name, value in sums.items()}


def _stack(pictures: Sequence[Any]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def measure(
    tokenizer: ImageTokenizer, pictures: list[Image.Image], distance: Distance | None, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each setting, and for each other format in files as large."""
    console, device = Console(stderr=True), tokenizer.latent_mean.device
    others = {
        kind: [other_files(picture, kind) for picture in track(pictures, kind, console=console)] for kind in FORMATS
    }
    rows = []
    for series, config in track(list(settings(tokenizer, arguments.tokens, arguments.bits)), "softvq", console=console):
        files = [compress(tokenizer, picture, config) for picture in pictures]
        copies = [decompress(tokenizer, data) for data in files]
        what = f"top {config.top}" if config.coder == "codewords" else f"{config.bits} bits"
        ours = {"series": series, "setting": what, "fits": 1.0, "bytes": sum(map(len, files)) / len(files)}
        rows.append(ours | figures(pictures, copies, distance, device))
        for kind in FORMATS if config.coder == "latents" else ():
            chosen = [
                best(picture, choices, len(data))
                for picture, choices, data in zip(pictures, others[kind], files, strict=True)
            ]
            there = [(picture, file) for picture, file in zip(pictures, chosen, strict=True) if file is not None]
            row = {"series": kind, "setting": f"in {series}, {what}", "fits": len(there) / len(pictures)}
            if there:
                row |= {"bytes": sum(file[0] for _, file in there) / len(there)}
                row |= figures([picture for picture, _ in there], [file[1] for _, file in there], distance, device)
            rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], title: str, pixels: int) -> None:
    """Print every row."""
    shown = [name for name in FIGURES if name in rows[0]]
    table = Table("", "setting", "fits", "bytes", "bits/pixel", *(FIGURES[name] for name in shown), title=title)
    for row in rows:
        size = row.get("bytes")
        rate = ["-", "-"] if size is None else [f"{size:,.0f}", f"{8 * size / pixels:.4f}"]
        values = [f"{row[name]:.3f}" if name in row else "-" for name in shown]
        table.add_row(row["series"], row["setting"], f"{row['fits']:.0%}", *rate, *values)
    Console(width=140, highlight=False).print(table)


def draw(rows: list[dict[str, Any]], name: str, path: Path) -> None:
    """Draw one figure over the bytes; of the other formats only what every photograph could be brought to."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if name in row and row["fits"] == 1 and "codewords" not in row["series"]:
            lines.setdefault(row["series"], []).append((row["bytes"], row[name]))
    if lines:
        with replacing(path) as temporary:
            chart = {series: sorted(points) for series, points in lines.items()}
            line_chart(chart, across="bytes", up=FIGURES[name], points=True).save(temporary)


def main() -> None:
    """Print the table and draw the charts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a tokenizer's folder or name")
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--out", type=Path, required=True, help="a folder for codec.json and the charts")
    parser.add_argument("--n", type=int, default=100, help="photographs, spread evenly over the folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--perceptual", default="st-lpips", help="as softvq evaluate takes it, or none")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    tokenizer = ImageTokenizer.from_pretrained(arguments.model).to(device)
    size = tokenizer.config.image_size
    paths = find_images(arguments.data)
    count = min(arguments.n, len(paths))
    paths = [paths[number * len(paths) // count] for number in range(count)]
    pictures = [center_crop(read_image(path), size) for path in paths]
    distance = None
    try:
        distance = load_distance(arguments.perceptual, (size, size), device)
    except InputError as error:
        Console(stderr=True).print(f"no perceptual distance: {error}", soft_wrap=True)
    rows = measure(tokenizer, pictures, distance, arguments)
    print_table(rows, f"{len(pictures)} photographs of {size} px", size**2)
    write_json(arguments.out / "codec.json", rows)
    for name in FIGURES:
        draw(rows, name, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
