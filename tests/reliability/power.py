"""Losing power: what a file system may hold if it forgets everything that was not flushed.

The calls of a save are recorded. For every moment between two of them, states are made in which names whose folder was
not flushed since may be there or not, and files that were not flushed hold anything.
"""

import dataclasses
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softvq.training.checkpoint import recover, save
from tests.reliability.disk import Figures, holds, run_with, tensors


@dataclasses.dataclass(frozen=True)
class Call:
    """A change to names (`make`, `folder`, `move`, `drop`), or a flush (`data` of a file, `names` of a folder)."""

    kind: str
    path: Path
    target: Path | None = None
    data: bytes = b""


def recorded_save(run: Path, step: int, keep: int) -> list[Call]:
    """Save a checkpoint and return the calls it made, in order."""
    calls: list[Call] = []
    original = {name: getattr(os, name) for name in ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")}

    def absolute(path: Any, dir_fd: int | None = None) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else Path(path)

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT:
            calls.append(Call("make", absolute(path, dir_fd)))
        return original["open"](path, flags, mode, dir_fd=dir_fd)

    def mkdir(path: Any, *args: Any, **options: Any) -> None:
        original["mkdir"](path, *args, **options)
        calls.append(Call("folder", Path(path)))

    def moved(source: Any, target: Any, name: str = "rename") -> None:
        original[name](source, target)
        calls.append(Call("move", Path(source), Path(target)))

    def dropped(path: Any, *, dir_fd: int | None = None, name: str = "unlink") -> None:
        calls.append(Call("drop", absolute(path, dir_fd)))
        original[name](path, dir_fd=dir_fd)

    def flushed(handle: int) -> None:
        original["fsync"](handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        calls.append(Call("names", path) if path.is_dir() else Call("data", path, data=path.read_bytes()))

    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("open", opened), ("mkdir", mkdir), ("rename", moved), ("fsync", flushed)):
            patch.setattr(os, name, function)
        patch.setattr(os, "replace", lambda source, target: moved(source, target, "replace"))
        patch.setattr(os, "unlink", dropped)
        patch.setattr(os, "rmdir", lambda path, *, dir_fd=None: dropped(path, dir_fd=dir_fd, name="rmdir"))
        save(run, step, tensors(step), {"note": step}, keep)
    return calls


def states(calls: list[Call], before: dict[Path, bytes], count: int, draws: random.Random) -> Iterator[dict[Path, Any]]:
    """Yield what may be on the disk: contents by path, None for a folder."""
    for _ in range(count):
        upto = draws.randrange(len(calls) + 1)
        disk: dict[Path, Any] = dict(before)
        flushed = {
            place for place, call in enumerate(calls[:upto]) if call.kind not in ("data", "names")
            for later in calls[place:upto] if later.kind == "names" and later.path == (call.target or call.path).parent
        }  # fmt: skip
        lost = draws.random()
        for place, call in enumerate(calls[:upto]):
            certain = place in flushed or call.kind == "data"
            if call.kind != "names" and (certain or draws.random() >= lost):
                _apply(disk, call, draws)
        yield disk


def _apply(disk: dict[Path, Any], call: Call, draws: random.Random) -> None:
    there = call.path in disk
    if call.kind == "folder":
        disk[call.path] = None
    elif call.kind == "make" and not there:
        disk[call.path] = bytes(draws.randrange(300))  # nobody has flushed it: it may hold anything
    elif call.kind == "data":
        disk[call.path] = call.data
    elif call.kind == "drop":
        disk.pop(call.path, None)
    elif call.kind == "move" and there and call.target is not None:
        moved = [path for path in disk if path == call.path or call.path in path.parents]
        for path in moved:
            disk[call.target / path.relative_to(call.path)] = disk.pop(path)


def power_losses(folder: Path, count: int, seed: int = 0) -> Figures:
    """Losing power in the middle of a save: every state holds the previous or the new checkpoint, whole."""
    run = run_with(folder / "powered", 10, 20)
    before = {path: path.read_bytes() if path.is_file() else None for path in [run, *sorted(run.rglob("*"))]}
    calls = recorded_save(run, 30, keep=2)
    found: Figures = {"calls": len(calls), "states": 0, "survived": 0, "with_the_new_one": 0}
    for disk in states(calls, before, count, random.Random(seed)):
        scratch = folder / "scratch"
        for path, data in sorted(disk.items()):
            place = scratch / path.relative_to(run)
            (place if data is None else place.parent).mkdir(parents=True, exist_ok=True)
            if data is not None:
                place.write_bytes(data)
        found["states"] += 1
        recover(scratch, lambda text: None)
        found["survived"] += holds(scratch, 20, 30)
        found["with_the_new_one"] += holds(scratch, 30)
        save(scratch, 40, tensors(40), {"note": 40}, keep=2)
        assert holds(scratch, 40)
        shutil.rmtree(scratch)
    return found
