"""The folder of a run, whatever is trained: whose it is, what it was started with, and going on in it.

config.yaml            the config, complete, with which the run can be repeated
run.json               hash of the config, fingerprint of the data set, versions
log.jsonl              one line a log step
status.json            running, finished, interrupted or failed
checkpoints/, samples/
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import softvq
from softvq.config import flat, from_dict, read_json, read_yaml, to_dict, to_yaml
from softvq.errors import InputError, RunError
from softvq.files import remove_leftovers, write_json, write_text
from softvq.locks import folder_lock
from softvq.ranks import is_main
from softvq.training import distributed
from softvq.training.checkpoint import Checkpoint
from softvq.training.trainer import Trainer

__all__ = ["FREE_FIELDS", "carry_out", "claim", "info", "register", "restore", "say"]

FREE_FIELDS = frozenset(
    f"train.{name}"
    for name in (
        *("device", "shard", "activation_checkpointing"),
        *("log_every", "save_every", "sample_every", "keep", "keep_best", "tensorboard", "trackers"),
        *("guard.action", "guard.max_bad_updates", "guard.max_rollbacks"),
    )
) | {"train.accumulate", "loss.adversarial.checkpoint"}
"""What a resumed run may change: what alters nothing that is computed, and what a run that lacked memory is told."""


def carry_out(
    train: Callable[[Console], Path], run: Path, device: str, *, resume: bool, console: Console | None
) -> Path:
    """Train with the other processes, if there are any, as the only ones in a folder.

    Args:
        train: Given the console, which is silent on all ranks but the first, returns what it made.
        run: The folder.
        device: As `train.device` names it.
        resume: Whether the folder has to be there.
        console: For people; None is silent.

    Returns:
        What was made.

    Raises:
        InputError: If there is nothing to resume, or another process trains in the folder.
        RunError: If another rank ended.
    """
    if resume and not run.is_dir() and not distributed.may_restart():  # what restarts by itself says --resume each time
        raise InputError(f"{run}: no such run to resume; leave --resume out to start it")
    distributed.join(distributed.choose_device(device))
    try:
        if not is_main():
            return train(Console(quiet=True))
        with folder_lock(run, "trained"):
            return train(console or Console(quiet=True))
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        raise RunError(f"{run}: {distributed.who_is_missing()}") from error
    finally:
        distributed.leave()


def claim(
    run: Path, config: Any, data: Mapping[str, Any], source: str, *, free: Set[str] = frozenset(), resume: bool
) -> None:
    """Make a folder this run's, or see that it is.

    Args:
        run: The folder, which exists and whose lock the caller holds.
        config: Of the run, a dataclass.
        data: The number of images and the fingerprint of the data set.
        source: What to call the data set in errors.
        free: Fields that may change beside `FREE_FIELDS`.
        resume: Whether the run was begun before.

    Raises:
        InputError: If it holds something else, or the config or the data changed.
    """
    others = [path.name for path in run.iterdir() if path.name != ".lock"]
    if others and not resume:
        raise InputError(f"{run}: is not empty; add --resume to go on with the run in it, or choose another folder")
    begun = (run / "config.yaml").exists() or (run / "checkpoints").exists()
    if others and not begun:
        raise InputError(f"{run}: is no run to resume, it holds {min(others)}; choose another folder")
    if begun:
        _check_config(run, config, FREE_FIELDS | free)
        remove_leftovers(run)
    if (run / "run.json").exists():
        before = read_json(run / "run.json").get("data", {})
        if before != data:
            numbers = f"it had {before.get('images')} images, now {data.get('images')}"
            raise InputError(f"{source}: is not the data set {run} was started with ({numbers}); restore it")


def register(run: Path, config: Any, data: Mapping[str, Any]) -> None:
    """Write down what a run is; not before everything is built, so that a mistake in a recipe leaves nothing.

    Args:
        run: The folder.
        config: Of the run.
        data: As for `claim`.
    """
    write_text(run / "config.yaml", to_yaml(config))
    write_json(run / "run.json", {**info(config), "data": dict(data)})


def info(config: Any) -> dict[str, Any]:
    """Return what a checkpoint remembers beside its tensors: the config's hash, and versions."""
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    return {"config_sha256": digest.hexdigest(), "versions": _versions()}


def restore(trainer: Trainer, saved: Checkpoint | None, *, resume: bool) -> None:
    """Go on from a checkpoint, and say so.

    Args:
        trainer: Of the run.
        saved: The checkpoint; None if there is none.
        resume: Whether one was hoped for.
    """
    run = trainer.run
    if saved:
        before, now = trainer.restore(saved).get("versions", {}), _versions()
        changed = [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            trainer.warn(f"the checkpoint was made with {'; '.join(changed)}: results may differ in the last bits")
        done = saved.step >= trainer.config.steps
        say(trainer.console, f"{run}: {'is finished' if done else 'goes on'}, at step {saved.step}")
    elif resume:
        say(trainer.console, f"{run}: has no checkpoint yet, starts at step 0")


def say(console: Console, text: str) -> None:
    """Print a sentence as it is, with no markup in it."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _check_config(run: Path, config: Any, free: Set[str]) -> None:
    path = run / "config.yaml"
    before = flat(to_dict(from_dict(type(config), read_yaml(path), str(path))))
    now = flat(to_dict(config))
    free = free | ({"train.steps"} if config.optim.schedule == "constant" else set())
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and name not in free
    ]
    if changed:
        raise InputError(
            f"{path}: the run was started with another config ({'; '.join(changed)}); undo that or start anew"
        )


def _versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"softvq": softvq.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "device": device, "threads": str(torch.get_num_threads())}
