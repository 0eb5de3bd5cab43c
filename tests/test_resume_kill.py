"""`kill -9` at random moments of a run, and inside its saves: what comes out is bit for bit the run that never stopped.

The harness runs in a process of its own, which imports everything once and forks a trainer for every trial.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MIN_KILLS, MIN_KILLS_IN_SAVES, MIN_RUNS = 14, 4, 3


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_runs_end_as_the_uninterrupted_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["mismatches"] == []
    assert result["kills"] >= MIN_KILLS
    assert result["kills_in_saves"] >= MIN_KILLS_IN_SAVES
    assert result["runs"] >= MIN_RUNS
    assert result["resumed_in_the_middle"] >= MIN_RUNS


def harness(folder: Path) -> dict[str, object]:
    """Kill and resume runs until enough kills were survived; compare every line and every final file."""
    draws = random.Random(0)
    make_photographs(folder / "photographs")
    started = time.monotonic()
    trial(folder, "reference", 0)
    assert os.wait()[1] == 0, "the uninterrupted run failed"
    seconds = time.monotonic() - started
    expected = outcome(folder / "reference")
    result = {"kills": 0, "kills_in_saves": 0, "runs": 0, "resumed_in_the_middle": 0, "mismatches": []}
    name = "run-0"
    while result["kills"] < MIN_KILLS or result["runs"] < MIN_RUNS or result["kills_in_saves"] < MIN_KILLS_IN_SAVES:
        in_save = draws.random() < 0.4
        pid = trial(folder, name, draws.choice([0, 0, 1]), draws.randrange(1, 60) if in_save else 0, draws.randrange(4))
        if not in_save:
            time.sleep(draws.uniform(0, seconds / 2))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        lines = log_lines(folder / name)
        result["mismatches"] += [line for line in lines if line not in expected["log"]]
        if os.WIFSIGNALED(status):
            result["kills"] += 1
            result["kills_in_saves"] += in_save
            result["resumed_in_the_middle"] += any((folder / name).glob("checkpoints/step-????????"))
        else:
            assert status == 0, f"a trainer failed with status {status}"
            if outcome(folder / name) != expected:
                result["mismatches"].append(f"outcome of {name}")
            result["runs"] += 1
            name = f"run-{result['runs']}"
    return result


def trial(folder: Path, name: str, num_workers: int, die_at_call: int = 0, die_in_save: int = 0) -> int:
    """Fork a trainer that starts or resumes a run; it may kill itself at a file-system call of one of its saves."""
    from softvq.training.tokenizer_run import train_tokenizer

    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if die_at_call:
            arm(die_at_call, die_in_save)
        train_tokenizer(run_config(folder, num_workers), folder / name, resume=(folder / name).exists())
        status = 0
    finally:
        if status:
            import traceback

            traceback.print_exc()
        os._exit(status)


def arm(call: int, save: int) -> None:
    """Let this process die at a certain file-system call of a certain save."""
    from softvq.training import checkpoint

    original, saves = checkpoint.save, iter(range(1 << 20))

    def armed(*args: object, **kwargs: object) -> object:
        if next(saves) == save:
            calls = iter(range(1, 1 << 20))
            for name in ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "close", "chmod", "stat"):
                setattr(os, name, deadly(getattr(os, name), calls))
        return original(*args, **kwargs)

    def deadly(function, calls):
        def wrapped(*args: object, **kwargs: object) -> object:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    checkpoint.save = armed


def run_config(folder: Path, num_workers: int):
    from softvq.config import from_dict
    from softvq.training.tokenizer_recipe import TokenizerRunConfig

    vit = {"width": 32, "depth": 1, "num_heads": 2}
    quantizer = {"kind": "softvq", "codebook_size": 64, "num_codebooks": 2}
    sizes = {"num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8}
    every = {"log_every": 1, "save_every": 7, "sample_every": 25, "keep": 2}
    data = {
        "model": {"encoder": vit, "decoder": vit, "quantizer": quantizer, **sizes},
        "data": {"path": str(folder / "photographs"), "num_workers": num_workers},
        "loss": {"perceptual_weight": 0.0},
        "optim": {"lr": 1e-3, "warmup_steps": 5},
        "train": {"batch_size": 4, "steps": 60, "ema_decay": 0.99, "device": "cpu", **every},
    }
    return from_dict(TokenizerRunConfig, data)


def make_photographs(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(10):
        blocks = draws.integers(0, 256, (6, 5 + number % 3, 3)).astype(np.uint8)
        Image.fromarray(blocks).resize((48 + number, 56), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def log_lines(run: Path) -> list[dict[str, object]]:
    from softvq.training.tracking import read_log

    return [{name: value for name, value in line.items() if name != "clock"} for line in read_log(run / "log.jsonl")]


def outcome(run: Path) -> dict[str, object]:
    from softvq.files import sha256

    files = ("checkpoints/step-00000060/state.safetensors", "tokenizer/model.safetensors", "samples/step-00000050.png")
    return {"log": log_lines(run), **{name: sha256(run / name) for name in files}}


if __name__ == "__main__":
    import torch

    import softvq.training.tokenizer_run  # noqa: F401 - once, before the forks

    torch.set_num_threads(1)
    print(json.dumps(harness(Path(sys.argv[1]))))
