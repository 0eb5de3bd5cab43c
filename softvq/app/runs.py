"""Runs of training as the app shows them: which there are, their curves, their pictures. Nothing is ever written."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from softvq.config import read_json
from softvq.data.images import MAX_FILE_BYTES
from softvq.errors import InputError
from softvq.training.tracking import curve_value, read_log

__all__ = ["list_runs", "read_picture", "read_run"]

MAX_RUNS = 500
MAX_DEPTH = 4
MAX_POINTS = 400
MAX_PICTURES = 60
MAX_LOG_BYTES = 256 << 20
MAX_CONFIG_BYTES = 1 << 20
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what the system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); choose another") from error


def list_runs(root: Path) -> list[dict[str, Any]]:
    """Return the runs below a folder, or the folder itself if it is one, the newest first.

    Args:
        root: The folder; it need not be there. Links to folders are not followed.

    Returns:
        Name, relative to the folder, and state and step of each, at most 500. Those with a name that is no text, which
        no address can hold, are left out.
    """
    found = []
    for folder, folders, names in os.walk(root):
        path = Path(folder)
        inside = "log.jsonl" in names
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if inside or len(path.relative_to(root).parts) >= MAX_DEPTH:
            folders.clear()
        if inside and len(found) < MAX_RUNS and _is_text(folder):
            with contextlib.suppress(OSError):  # a link to nowhere, or gone by now
                found.append((path.joinpath("log.jsonl").stat().st_mtime, path))
    found.sort(key=lambda pair: (-pair[0], str(pair[1])))
    return [{"name": path.relative_to(root).as_posix(), **_status(path)} for _, path in found]


@_told()
def read_run(root: Path, name: str) -> dict[str, Any]:
    """Return what a run logged.

    Args:
        root: The folder of runs.
        name: Of the run, relative to it.

    Returns:
        State and step, the config's text, curves by name as pairs of step and value, at most 400 each, and the names
        of its pictures, the newest first.

    Raises:
        InputError: If there is no such run, or it cannot be read, or its log is too large to show.
    """
    run = _inside(root, name)
    log = _inside(root, f"{name}/log.jsonl")
    if not log.is_file():
        raise InputError(f"{name}: is no run in {root}; choose another")
    if log.stat().st_size > MAX_LOG_BYTES:
        raise InputError(f"{name}: the log has more than {MAX_LOG_BYTES >> 20} MiB; look at it with another program")
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in read_log(log):
        for key, value in _numbers(record):
            curves.setdefault(key, []).append((record["step"], value))
    return {
        "name": name,
        **_status(run),
        "config": _config_text(root, name),
        "curves": {key: _thinned(points) for key, points in curves.items()},
        "pictures": _pictures(run),
    }


@_told()
def read_picture(root: Path, name: str, picture: str) -> tuple[bytes, str]:
    """Return the bytes of a picture of a run, and their media type.

    Args:
        root: The folder of runs.
        name: Of the run, relative to it.
        picture: Name of a file in its `samples/`.

    Returns:
        What is in the file, whatever that is, and the type its name promises.

    Raises:
        InputError: If there is no such picture there, or it cannot be read.
    """
    path = _inside(root, f"{name}/samples/{picture}")
    if path.suffix.lower() not in MEDIA or path.parent.name != "samples" or not path.is_file():
        raise InputError(f"{picture}: is no picture of the run {name}; look at another")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{picture}: is larger than {MAX_FILE_BYTES >> 20} MiB; look at it with another program")
    return path.read_bytes(), MEDIA[path.suffix.lower()]


def _inside(root: Path, name: str) -> Path:
    """Return a path below the folder, with all links resolved; refuse one that would lead out of it."""
    whole = Path(os.path.realpath(root))
    try:
        path = Path(os.path.realpath(whole / name))
    except ValueError as error:  # a null character
        raise InputError("the name of the run holds a character that no file has; choose another") from error
    if path != whole and whole not in path.parents:
        raise InputError(f"{name}: leads out of {root}; choose a run in it")
    return path


def _status(run: Path) -> dict[str, Any]:
    path = run / "status.json"
    try:
        status = read_json(path) if path.is_file() and not path.is_symlink() else {}
    except InputError:  # a run that writes at this moment, or no status at all
        status = {}
    state, step = status.get("state"), status.get("step")
    return {
        "state": state if isinstance(state, str) else None,
        "step": step if isinstance(step, int) and not isinstance(step, bool) else None,
        "message": str(status.get("message", "")),
    }


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the curves that a record of the log has a point of."""
    clock, samples = record.get("clock"), record.get("samples")
    parts = [("", record), ("samples: ", samples), ("clock: ", clock)]
    for prefix, values in parts:
        for key, value in values.items() if isinstance(values, dict) else ():
            found = curve_value(value)
            if found is not None and (prefix, key) not in {("", "step"), ("clock: ", "time")}:
                yield f"{prefix}{key}", found


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most as many points as a screen has room for, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _config_text(root: Path, name: str) -> str:
    path = _inside(root, f"{name}/config.yaml")
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _pictures(run: Path) -> list[str]:
    folder = run / "samples"
    names = sorted(os.listdir(folder), reverse=True) if folder.is_dir() and not folder.is_symlink() else []
    return [name for name in names if Path(name).suffix.lower() in MEDIA and _is_text(name)][:MAX_PICTURES]


def _is_text(name: str) -> bool:
    """Tell whether a name is UTF-8 on the disk; bytes that are not come as half surrogates."""
    return name.encode(errors="ignore").decode() == name
