"""Run checkpoints: written whole or not at all, found by verification, pruned last.

A checkpoint is a folder `checkpoints/step-00000100` of

    state.safetensors   every tensor of the run
    state.json          the step and what else is no tensor
    manifest.json       size and SHA-256 of the other two

It is written under a temporary name and appears by one rename, so a crash at any moment leaves the previous one.
"""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from softvq.config import read_json
from softvq.errors import InputError, RunError
from softvq.files import fsync_folder, json_text, read_tensors, sha256, write_json, write_tensors

__all__ = ["Checkpoint", "discard_after", "latest", "load", "prune", "recover", "save", "verify"]

FORMAT = 1
STATE_FILES = ("state.safetensors", "state.json")
NAME = re.compile(r"step-(\d{8,})")
SPARE = 1.2
"""Free space asked for before a save, in sizes of what is saved."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    folder: Path
    """Where it is."""
    step: int
    """Finished updates."""


def save(
    run: Path, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any], keep: int, every: int = 1
) -> Checkpoint:
    """Write a checkpoint and prune old ones.

    Args:
        run: Folder of the run, whose lock the caller holds.
        step: Finished updates.
        tensors: Everything the run is made of, on any device.
        info: What else to remember, as JSON takes it.
        keep: Checkpoints to keep, at least 1.
        every: See `prune`.

    Returns:
        The new checkpoint.

    Raises:
        RunError: If it cannot be written, on a full disk for example; the ones before are untouched.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _check_space(temporary, tensors)
        write_tensors(temporary / "state.safetensors", tensors)
        write_json(temporary / "state.json", {**info, "step": step})
        write_json(temporary / "manifest.json", {"format": FORMAT, "files": _describe(temporary)})
        os.rename(temporary, folder)
        fsync_folder(folder.parent)
    except (OSError, RunError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise RunError(
            f"{folder}: the checkpoint cannot be written ({reason}); the ones before it are intact"
        ) from error
    with contextlib.suppress(OSError):  # what cannot be deleted now is deleted after the next save
        prune(run, keep, every)
    return Checkpoint(folder=folder, step=step)


def verify(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest, byte for byte.

    Args:
        folder: One of `checkpoints/step-*`.

    Returns:
        What is wrong with it in a few words, or nothing.
    """
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest.get("format") != FORMAT or set(manifest) != {"format", "files"}:
            return "manifest.json is not of a format this version reads"
        if (folder / "manifest.json").read_bytes() != json_text(manifest).encode():  # not a blank may differ
            return "manifest.json is not what was written"
        if set(manifest["files"]) != set(STATE_FILES):
            return "manifest.json does not list the right files"
        for name, expected in manifest["files"].items():
            if (folder / name).stat().st_size != expected["size"] or sha256(folder / name) != expected["sha256"]:
                return f"{name} is not what was written"
        if f"step-{read_json(folder / 'state.json')['step']:08d}" != folder.name:
            return "state.json is of another step"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except InputError as error:
        return str(error).removeprefix(f"{folder}{os.sep}")
    except (AttributeError, KeyError, TypeError, ValueError):
        return "manifest.json is damaged"
    return None


def latest(run: Path, every: int = 1) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or nothing; it changes nothing and may run during a save.

    Args:
        run: Folder of the run.
        every: Look only at steps that this divides.

    Returns:
        The checkpoint.
    """
    while True:
        folders = _folders(run)
        for step, folder in folders:
            if step % every == 0 and verify(folder) is None:
                return Checkpoint(folder=folder, step=step)
        if _folders(run) == folders:  # otherwise some were pruned while being read
            return None


def recover(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Clean up after a crash and return the newest checkpoint that verifies.

    Leftovers of unfinished saves are deleted; damaged checkpoints that are newer than the one returned are renamed to
    `*.corrupt` and reported.

    Args:
        run: Folder of the run, whose lock the caller holds.
        warn: Takes one sentence for each damaged checkpoint.

    Returns:
        The checkpoint to go on from, or nothing if the run never saved one.

    Raises:
        RunError: If there are checkpoints and all of them are damaged.
    """
    for leftover in (run / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for step, folder in _folders(run):
        problem = verify(folder)
        if problem is None:
            return Checkpoint(folder=folder, step=step)
        aside = folder.with_name(f"{folder.name}.corrupt")
        while aside.exists():
            aside = aside.with_name(f"{aside.name.removesuffix('.corrupt')}+.corrupt")
        folder.rename(aside)
        warn(f"{folder}: {problem}; set aside as {aside.name}")
    damaged = sorted((run / "checkpoints").glob("step-*.corrupt"))
    if damaged:
        names = ", ".join(folder.name for folder in damaged)
        raise RunError(f"{run}: every checkpoint is damaged ({names}); restore one, or train anew in another folder")
    return None


def load(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Args:
        checkpoint: As `latest` and `recover` return it: verified.

    Returns:
        The tensors on the CPU, and what else `save` was given, with the `step`.
    """
    tensors, _ = read_tensors(checkpoint.folder / "state.safetensors")
    return tensors, read_json(checkpoint.folder / "state.json")


def prune(run: Path, keep: int, every: int = 1) -> None:
    """Delete all but the newest checkpoints that verify, and the best; each first loses its name, then its files.

    The best is the one whose `state.json` has the highest `score`, if any has one.

    Args:
        run: Folder of the run, whose lock the caller holds.
        keep: How many are kept, at least 1.
        every: The newest of those whose step this divides is kept, too.
    """
    assert keep >= 1
    kept = regular = 0
    best = _best(run)
    for step, folder in _folders(run):
        if kept < keep or (not regular and step % every == 0):
            intact = verify(folder) is None
            kept += intact
            regular += intact and step % every == 0
        elif folder != best:
            _delete(folder)


def discard_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps, from which a run that went back to this one took another way."""
    for later, folder in _folders(run):
        if later > step:
            _delete(folder)


def _best(run: Path) -> Path | None:
    scores: dict[Path, float] = {}
    for _, folder in _folders(run):
        with contextlib.suppress(InputError):
            score = read_json(folder / "state.json").get("score")
            if isinstance(score, int | float):
                scores[folder] = score
    ranked = sorted(scores, key=lambda folder: scores[folder], reverse=True)  # of equals the newest
    return next((folder for folder in ranked if verify(folder) is None), None)


def _delete(folder: Path) -> None:
    victim = folder.with_name(f"{folder.name}.tmp-pruned-{os.getpid()}")
    os.rename(folder, victim)
    shutil.rmtree(victim)


def _folders(run: Path) -> list[tuple[int, Path]]:
    folder = run / "checkpoints"
    matches = ((NAME.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in STATE_FILES}


def _check_space(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    needed = int(SPARE * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(f"{needed >> 20} MiB needed, {free >> 20} MiB free")
