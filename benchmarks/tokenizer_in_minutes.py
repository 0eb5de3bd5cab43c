"""Train a tokenizer from scratch in so many minutes of one device, and judge it by photographs it has not seen.

    python benchmarks/tokenizer_in_minutes.py --config configs/flowers-64.yaml --data FOLDER --minutes 8 --out OUT

`FOLDER` holds `train` and `val`. The recipe's schedule is stretched or shortened as a whole: an update of each phase
and the reading of its photographs are timed first, and what this and compiling take is counted, so that all of it ends
after about so many minutes.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console

from softvq.cli import main as softvq
from softvq.commands.train import read_recipe
from softvq.data.folder import PhotoFolder, batches
from softvq.training.rehearsal import rehearse
from softvq.training.tokenizer_recipe import TokenizerRunConfig
from softvq.training.tokenizer_run import train_tokenizer

SCHEDULE = ("loss.perceptual_start", "loss.perceptual_warmup_steps", "loss.anneal_steps", "optim.warmup_steps")


def stretched(config: TokenizerRunConfig, steps: int) -> list[str]:
    """Return overrides that give a recipe so many steps, with its schedule in proportion."""
    found = [f"train.steps={steps}"]
    for name in SCHEDULE:
        section, field = name.split(".")
        found.append(f"{name}={round(getattr(getattr(config, section), field) * steps / config.train.steps)}")
    return found


def seconds_of_an_update(config: TokenizerRunConfig) -> float:
    """Return the mean over a run, the phases having their share of it."""
    phases = list(rehearse(config, Console(quiet=True), lambda _: None))
    ends = [phase.first_step for phase in phases[1:]] + [config.train.steps]
    spent = sum(phase.seconds * (end - phase.first_step) for phase, end in zip(phases, ends, strict=True))
    return spent / config.train.steps


def seconds_of_a_batch(config: TokenizerRunConfig) -> float:
    """Return how long the data workers take for a batch when nothing waits for them."""
    folder = PhotoFolder(str(config.data.path), config.model.image_size, config.data, config.seed)
    ahead = 4 * max(1, config.data.num_workers)
    stream = batches(folder, config.train.batch_size, 0, 2 * ahead, config.data.num_workers)
    for _ in range(ahead):
        next(stream)
    started = time.perf_counter()
    for _ in range(ahead):
        next(stream)
    return (time.perf_counter() - started) / ahead


def main() -> None:
    """Train, and print what `softvq evaluate reconstruction` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, all it takes to start included")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--features", nargs="*", default=[], help="as softvq evaluate reconstruction takes them")
    parser.add_argument("--perceptual", default="auto", help="as softvq evaluate reconstruction takes it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the recipe")
    arguments = parser.parse_args()
    started = time.perf_counter()
    changes = {"data.path": str(arguments.data / "train"), "train.device": arguments.device}
    config = read_recipe(arguments.config, arguments.overrides, changes)
    update, batch = seconds_of_an_update(config), seconds_of_a_batch(config)
    seconds = max(update, batch)
    spent = time.perf_counter() - started
    steps = max(20, int((arguments.minutes * 60 - spent) / seconds))
    config = read_recipe(arguments.config, [*arguments.overrides, *stretched(config, steps)], changes)
    tokenizer = train_tokenizer(config, arguments.out / "run")
    minutes = (time.perf_counter() - started) / 60
    Console().print(
        f"{steps} updates of {config.train.batch_size} images, {minutes:.2f} minutes in all; "
        f"before, an update took {1e3 * update:.1f} ms, reading its photographs {1e3 * batch:.1f} ms",
        soft_wrap=True,
    )
    features = ["--features", *arguments.features] if arguments.features else []
    given = ["evaluate", "reconstruction", str(tokenizer), str(arguments.data / "val")]
    options = ["--out", str(arguments.out / "report"), "--device", arguments.device, "--overwrite"]
    raise SystemExit(softvq([*given, *features, *options, "--perceptual", arguments.perceptual]))


if __name__ == "__main__":
    main()
