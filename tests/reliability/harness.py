"""What the campaigns share: a tiny run with every part on, trainers as forks of a warm process, and what they leave."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from softvq.config import from_dict
from softvq.errors import InputError, Interrupted, RunError
from softvq.files import sha256
from softvq.training.tokenizer_recipe import TokenizerRunConfig
from softvq.training.tokenizer_run import train_tokenizer
from softvq.training.tracking import read_log

STEPS = 24
SAVE_EVERY = 5


def run_config(
    folder: Path, num_workers: int = 0, optim: Mapping[str, Any] = MappingProxyType({}), start: int = 8, **train: Any
) -> TokenizerRunConfig:
    """Return a recipe with a discriminator, which starts in the middle, over a folder's photographs."""
    vit = {"width": 16, "depth": 1, "num_heads": 2}
    quantizer = {"kind": "softvq", "codebook_size": 16, "num_codebooks": 2}
    sizes = {"num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8}
    every = {"log_every": 1, "save_every": SAVE_EVERY, "sample_every": 12, "keep": 2}
    critic = {"discriminator": {"kind": "patchgan", "width": 8, "depth": 2}, "start": start}
    data = {
        "model": {"encoder": vit, "decoder": vit, "quantizer": quantizer, **sizes},
        "data": {"path": str(folder / "photographs"), "num_workers": num_workers, "max_bad_fraction": 0.5},
        "loss": {"perceptual_weight": 0.0, "adversarial": critic},
        "optim": {"lr": 1e-3, "warmup_steps": 5, **optim},
        "train": {"batch_size": 4, "steps": STEPS, "ema_decay": 0.99, "device": "cpu", **every, **train},
    }
    return from_dict(TokenizerRunConfig, data)


def make_photographs(folder: Path, count: int = 10) -> None:
    """Write small photographs into `photographs`."""
    (folder / "photographs").mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number in range(count):
        blocks = draws.integers(0, 256, (6, 5 + number % 3, 3)).astype(np.uint8)
        picture = Image.fromarray(blocks).resize((48 + number, 56), Image.Resampling.BICUBIC)
        picture.save(folder / "photographs" / f"{number}.jpg")


def fork(work: Callable[[], object], quiet: bool = True) -> int:
    """Do something in a fork, which ends with the exit code that the program would have; return its process."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except (InputError, RunError, Interrupted) as error:
        status = error.exit_code
        if not quiet:
            print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def code_of(pid: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(folder: Path, name: str, num_workers: int = 0, **settings: Any) -> None:
    """Start or resume a run."""
    train_tokenizer(run_config(folder, num_workers, **settings), folder / name, resume=(folder / name).exists())


def trained(folder: Path, name: str, **settings: Any) -> int:
    """Train in a fork to the end and return its exit code."""
    return code_of(fork(lambda: train(folder, name, **settings)))


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Return the log without the clock; floats as text, so that equal means equal bit for bit."""
    records = read_log(run / "log.jsonl")
    return [json.loads(json.dumps({k: v for k, v in record.items() if k != "clock"})) for record in records]


def outcome(run: Path, steps: int = STEPS) -> dict[str, Any]:
    """Return everything that has to be equal in the end: the log, and hashes of files."""
    files = (f"checkpoints/step-{steps:08d}/state.safetensors", "tokenizer/model.safetensors")
    pictures = sorted(path.name for path in (run / "samples").glob("*.png"))
    return {
        "log": lines_of(run),
        **{name: sha256(run / name) if (run / name).exists() else None for name in files},
        **{name: sha256(run / "samples" / name) for name in pictures},
    }


def apart(one: Path, other: Path, name: str = "loss") -> float:
    """Return the largest relative difference of a figure of two runs at any step; infinite if steps are missing."""
    ours, theirs = ({line["step"]: line[name] for line in lines_of(run) if name in line} for run in (one, other))
    return max(abs(theirs[step] / ours[step] - 1) for step in ours) if ours.keys() == theirs.keys() else float("inf")


@dataclasses.dataclass
class Reference:
    """The run that nothing happened to."""

    outcome: dict[str, Any]
    seconds: float


def reference(folder: Path) -> Reference:
    """Train without a fault, in a folder that has photographs or gets them."""
    if not (folder / "photographs").exists():
        make_photographs(folder)
    started = time.monotonic()
    assert trained(folder, "reference") == 0, "the run without faults failed"
    return Reference(outcome=outcome(folder / "reference"), seconds=time.monotonic() - started)


FILE_CALLS = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "close", "chmod", "stat")


def at_call_of_save(call: int, save: int, act: Callable[[], None]) -> None:
    """Let this process do something at a certain file-system call of a certain save, from 0."""
    from softvq.training import checkpoint

    original, saves, calls = checkpoint.save, iter(range(1 << 20)), iter(range(1 << 20))

    def armed(*args: Any, **kwargs: Any) -> Any:
        with wrapped_calls(counted) if next(saves) == save else contextlib.nullcontext():
            return original(*args, **kwargs)

    def counted() -> None:
        if next(calls) == call:
            act()

    checkpoint.save = armed


@contextlib.contextmanager
def wrapped_calls(before: Callable[[], None]) -> Iterator[None]:
    """Within it, `before` is called before every call to the file system."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before()
            return function(*args, **kwargs)

        return wrapped

    originals = {name: getattr(os, name) for name in FILE_CALLS}
    try:
        for name, function in originals.items():
            setattr(os, name, wrap(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(os, name, function)


def kill_self() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
