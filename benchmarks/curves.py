"""How time and memory grow with tokens, batch, model and picture, beside what arithmetic says.

    python benchmarks/curves.py benchmarks/results/curves --device cuda

Each point is one call of `softvq bench`, whose file is kept in the folder: the same command goes on where it was
stopped, and only draws where all files are there. The second line of each picture is analytic: floating-point
operations of the network's matrix products over what a large product reached in the same call for time, and the
weights alone for memory. `--tiny` has shapes for two cores.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from experiments.plots import Point, plot
from softvq.cli import main as softvq
from softvq.commands.bench import BenchReport
from softvq.config import from_dict, read_json
from softvq.files import replacing
from softvq.generators.generator import LatentGenerator
from softvq.generators.presets import generator_preset
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.presets import preset

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One quantity that grows."""

    name: str
    """Of its pictures."""
    across: str
    """What grows."""
    places: Mapping[float, str]
    """What is timed at each place, as one would type it after `softvq bench`."""


def curves(tiny: bool) -> list[Curve]:
    """Return what is timed; a step of SiT has guidance, so that it sees twice the batch."""
    size, batch = ("sit-s", 1) if tiny else ("sit-xl", 16)
    step = f"sample --latents-only --batch {batch}"
    tokens = (16, 32, 64) if tiny else (16, 32, 64, 128, 256, 512, 1024)
    batches = (1, 2) if tiny else (1, 2, 4, 8, 16, 32, 64, 128)
    sizes = ("sit-s", "sit-b") if tiny else ("sit-s", "sit-b", "sit-l", "sit-xl")
    sides = (64, 128) if tiny else (128, 192, 256, 320, 384, 448, 512)
    name, images = ("softvq-s-64", 1) if tiny else ("softvq-b-64", 32)
    return [
        Curve(
            name="tokens",
            across=f"tokens of an image, {size}, {batch} images",
            places={count: f"{step} --generator {size} --tokens {count} --dim 32" for count in tokens},
        ),
        Curve(
            name="batch",
            across=f"images at once, {size}, 64 tokens",
            places={
                count: f"sample --latents-only --generator {size} --tokens 64 --dim 32 --batch {count}"
                for count in batches
            },
        ),
        Curve(
            name="model",
            across=f"parameters in millions, SiT of 64 tokens, {batch} images",
            places={_millions(each): f"{step} --generator {each} --tokens 64 --dim 32" for each in sizes},
        ),
        *(
            Curve(
                name=job,
                across=f"side of the pictures in pixels, {name}, {images} pictures",
                places={side: f"{job} --preset {name} --size {side} --batch {images}" for side in sides},
            )
            for job in ("encode", "decode")
        ),
    ]


def _millions(name: str) -> float:
    with torch.device("meta"):
        network = LatentGenerator(generator_preset(name, num_tokens=64, latent_dim=32))
    return round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1)


def weight_bytes(line: str, bytes_each: int) -> int:
    """Return the bytes of the network that a line of `softvq bench` times."""
    words = line.split()
    given = dict(itertools.pairwise(words))
    with torch.device("meta"):
        if words[0] == "sample":
            shape = {"num_tokens": int(given["--tokens"]), "latent_dim": int(given["--dim"])}
            network: torch.nn.Module = LatentGenerator(generator_preset(given["--generator"], **shape))
        else:
            tokenizer = ImageTokenizer(dataclasses.replace(preset(given["--preset"]), image_size=int(given["--size"])))
            network = getattr(tokenizer, f"{words[0]}r")
    return bytes_each * sum(parameter.numel() for parameter in network.parameters())


def series(curve: Curve, reports: Mapping[float, BenchReport]) -> dict[str, dict[str, list[Point]]]:
    """Return the lines of both pictures: milliseconds and GiB, measured and analytic."""
    found: dict[str, dict[str, list[Point]]] = {"time": {}, "memory": {}}
    for place, report in sorted((float(place), report) for place, report in reports.items()):
        row = report.rows[0]
        half = 1e3 * (row.high - row.low) / 2
        found["time"].setdefault("measured", []).append(Point(x=place, y=1e3 * row.seconds, half=half))
        if row.flops is not None:
            floor = 1e3 * row.flops / report.peak_flops
            found["time"].setdefault("matrix products alone", []).append(Point(x=place, y=floor))
        if row.memory:
            least = weight_bytes(curve.places[place], 4 if row.precision == "float32" else 2) / GIB
            found["memory"].setdefault("measured", []).append(Point(x=place, y=row.memory / GIB))
            found["memory"].setdefault("weights alone", []).append(Point(x=place, y=least))
    return found


def draw(curve: Curve, reports: Mapping[float, BenchReport], out: Path) -> list[Path]:
    """Draw time and, where it is known, memory."""
    one = next(iter(reports.values()))
    title, written = f"{one.machine}, torch {one.torch}, {one.rows[0].precision}", []
    for kind, lines in series(curve, reports).items():
        if lines:
            path = out / f"{curve.name}-{kind}.png"
            up = f"ms of one {one.rows[0].job}" if kind == "time" else "GiB at most"
            with replacing(path) as temporary:
                plot(lines, title=title, across=curve.across, up=up, ticks=list(map(float, curve.places))).save(
                    temporary
                )
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, and draw; return the first exit code but 0 of a call."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results and the pictures")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, plain float32 networks")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tokens, batch, model, encode, decode")
    arguments = parser.parse_args(argv)
    how = ["--precision", "float32", "--no-compile", "--rounds", "3"] if arguments.tiny else []
    for curve in curves(arguments.tiny):
        if arguments.only and curve.name not in arguments.only:
            continue
        reports = {}
        for place, line in curve.places.items():
            path = arguments.out / f"{curve.name}-{place:g}.json"
            if not path.exists():
                code = softvq(["bench", *line.split(), *how, "--device", arguments.device, "--out", str(path)])
                if code:
                    return code
            reports[place] = from_dict(BenchReport, read_json(path), str(path))
        print(*draw(curve, reports, arguments.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
