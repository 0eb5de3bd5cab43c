"""Arguments of softvq bench and softvq estimate."""

import argparse

from softvq.arguments.shared import Commands, add_command, positive

__all__ = ["DEVICE_NAMES", "STANDARD", "add_bench", "add_estimate"]

DEVICE_NAMES = ("h100", "h200", "a100", "4090")

RANDOM = "loss.alignment.pretrained=false loss.adversarial.discriminator.pretrained=false"
BOTH = f"loss.perceptual_start=0 loss.perceptual_warmup_steps=0 loss.adversarial.start=0 {RANDOM}"
FAST = "train.compile=true train.cuda_graph=true"
STANDARD = {
    "cuda": (
        *(
            f"{line} --precision {precision}"
            for line in (
                "sample --generator sit-xl --preset softvq-l-32 --tokens 32 --dim 64 --batch 64",
                "sample --generator sit-xl --preset softvq-l-64 --tokens 64 --dim 32 --batch 64",
                "sample --generator sit-xl --tokens 256 --dim 16 --batch 64 --latents-only",
                "sample --generator sit-xl --tokens 1024 --dim 16 --batch 32 --latents-only",
                "encode --preset softvq-b-64 --batch 128",
                "decode --preset softvq-b-64 --batch 128",
                "encode --preset softvq-l-64 --batch 128",
                "decode --preset softvq-l-64 --batch 128",
                "encode --preset softvq-bl-64 --size 512 --batch 64",
                "decode --preset softvq-bl-64 --size 512 --batch 64",
            )
            for precision in ("bf16", "fp8")
        ),
        *(
            f"train-generator configs/generators/sit-xl.yaml train.batch_size={batch} train.cuda_graph=true {shape}"
            for batch, shape in (
                (128, "--tokens 32 --dim 64"),
                (1024, "--tokens 32 --dim 64"),
                (128, "--tokens 64 --dim 32"),
            )
        ),
        f"train-tokenizer configs/softvq-b-64.yaml train.batch_size=64 {FAST} {BOTH}",
        f"train-tokenizer configs/softvq-l-64.yaml train.batch_size=32 {FAST} {BOTH}",
        *(
            f"sample --generator sit-xl --tokens {tokens} --dim 16 --batch {batch} --latents-only --no-compile"
            for tokens, batch in ((256, 64), (1024, 32))  # what the fast path brings, for benchmarks/end_to_end.py
        ),
    ),
    "cpu": (
        "encode --preset softvq-s-64 --batch 4 --precision float32 --no-compile --baseline timm",
        "decode --preset softvq-s-64 --batch 4 --precision float32 --no-compile --baseline timm",
        "sample --generator sit-s --preset softvq-s-64 --batch 4 --steps 25 --precision float32 --no-compile",
    ),
}
"""What `bench all` runs on a kind of device, as one would type it."""


def add_bench(commands: Commands) -> None:
    """Add bench with a command for each job, and one for tables."""
    bench = commands.add_parser("bench", help="time models on this machine", description="Time models on this machine.")
    jobs = bench.add_subparsers(title="jobs", metavar="JOB", required=True, dest="job")
    for job in ("encode", "decode"):
        command = add_command(jobs, job, "bench:bench", f"time how fast a tokenizer can {job}")
        command.add_argument("--preset", default="softvq-s-64", metavar="NAME", help="its size (default: softvq-s-64)")
        command.add_argument("--size", type=positive, metavar="N", help="side of the images (default: the preset's)")
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
    sample.add_argument("--latents-only", action="store_true", help="leave the decoding out")
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
        train.add_argument("--profile", action="store_true", help="tell which kernels of a GPU take the time")
        _add_common(train)
    every = add_command(jobs, "all", "bench:bench_all", "run a standard list of jobs, one file for each, and print all")
    every.add_argument("out", metavar="DIR", help="folder of the results; what is in it is not measured again")
    every.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    every.set_defaults(standard=STANDARD, parse=lambda line: bench.parse_args(line.split()))
    table = add_command(jobs, "table", "bench:bench_table", "print a Markdown table of files that --out wrote")
    table.add_argument("results", nargs="+", metavar="FILE", help="a JSON file")


def add_estimate(commands: Commands) -> None:
    """Add estimate."""
    command = add_command(
        commands, "estimate", "estimate:estimate", "say what a training takes: parameters, FLOPs, memory, hours"
    )
    command.add_argument("config", metavar="CONFIG", help="the recipe of a tokenizer or a generator, a YAML file")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the recipe, e.g. train.steps=9")
    _add_shape(command)
    command.add_argument("--classes", type=positive, default=1000, metavar="N", help="(default: 1000)")
    command.add_argument("--processes", type=positive, default=1, metavar="N", help="that share it (default: 1)")
    command.add_argument("--device", default="auto", metavar="NAME", help="measured: auto, cpu or cuda (default: auto)")
    command.add_argument(
        "--device-name", choices=DEVICE_NAMES, help="a GPU by what its maker publishes, instead of measuring this one"
    )
    command.add_argument(
        "--utilisation", type=float, default=0.3, metavar="SHARE", help="of the peak that is reached (default: 0.3)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_shape(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tokens", type=positive, default=64, metavar="N", help="of an image (default: 64)")
    command.add_argument("--dim", type=positive, default=32, metavar="N", help="numbers in a token (default: 32)")


def _add_networks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch", type=positive, default=16, metavar="N", help="images at once (default: 16)")
    command.add_argument(
        "--precision", choices=("bf16", "fp8", "float32"), default="bf16", help="fp8 is for CUDA (default: bf16)"
    )
    command.add_argument("--no-compile", dest="compile", action="store_false", help="run the networks as they are")
    command.add_argument("--rounds", type=positive, default=20, metavar="N", help="calls that count (default: 20)")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    command.add_argument("--out", metavar="FILE", help="write what was measured as JSON")
    command.add_argument("--overwrite", action="store_true", help="replace FILE")
