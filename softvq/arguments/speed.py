"""Arguments of softvq bench."""

import argparse

from softvq.arguments.shared import Commands, add_command, positive

__all__ = ["add_bench"]


def add_bench(commands: Commands) -> None:
    """Add bench with a command for each job, and one for tables."""
    bench = commands.add_parser("bench", help="time models on this machine", description="Time models on this machine.")
    jobs = bench.add_subparsers(title="jobs", metavar="JOB", required=True, dest="job")
    for job in ("encode", "decode"):
        command = add_command(jobs, job, "bench:bench", f"time how fast a tokenizer can {job}")
        command.add_argument("--preset", default="softvq-s-64", metavar="NAME", help="its size (default: softvq-s-64)")
        command.add_argument(
            "--baseline", choices=("timm",), help="time the bare transformer of timm at equal shapes too, in turns"
        )
        _add_networks(command)
        _add_common(command)
    sample = add_command(jobs, "sample", "bench:bench", "time a generator, and the decoding of what it makes")
    sample.add_argument("--generator", default="sit-s", metavar="NAME", help="its preset (default: sit-s)")
    sample.add_argument(
        "--preset", default="softvq-s-64", metavar="NAME", help="the tokenizer's (default: softvq-s-64)"
    )
    sample.add_argument("--size", type=positive, metavar="N", help="side of the images (default: the tokenizer's)")
    sample.add_argument("--sampler", default="euler", metavar="NAME", help="as in a sampling recipe (default: euler)")
    sample.add_argument("--steps", type=positive, default=250, metavar="N", help="for images/s (default: 250)")
    sample.add_argument("--guidance", type=float, default=1.75, metavar="SCALE", help="(default: 1.75)")
    _add_shape(sample)
    _add_networks(sample)
    _add_common(sample)
    for kind, sentence in (("tokenizer", "an update of each phase"), ("generator", "an update on latents in memory")):
        train = add_command(jobs, f"train-{kind}", "bench:bench", f"time {sentence} of a {kind}'s recipe")
        train.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file")
        train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the recipe, e.g. train.steps=9")
        if kind == "generator":
            _add_shape(train)
            train.add_argument("--classes", type=positive, default=1000, metavar="N", help="(default: 1000)")
        _add_common(train)
    table = add_command(jobs, "table", "bench:bench_table", "print a Markdown table of files that --out wrote")
    table.add_argument("results", nargs="+", metavar="FILE", help="a JSON file")


def _add_shape(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tokens", type=positive, default=64, metavar="N", help="of an image (default: 64)")
    command.add_argument("--dim", type=positive, default=32, metavar="N", help="numbers in a token (default: 32)")


def _add_networks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch", type=positive, default=16, metavar="N", help="images at once (default: 16)")
    command.add_argument("--precision", choices=("bf16", "float32"), default="bf16", help="(default: bf16)")
    command.add_argument("--no-compile", dest="compile", action="store_false", help="run the networks as they are")
    command.add_argument("--rounds", type=positive, default=20, metavar="N", help="calls that count (default: 20)")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    command.add_argument("--out", metavar="FILE", help="write what was measured as JSON")
    command.add_argument("--overwrite", action="store_true", help="replace FILE")
