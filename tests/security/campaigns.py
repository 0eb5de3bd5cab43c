"""Reading hostile files under limits of time and memory, each campaign with its figures."""

import dataclasses
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softvq.config import from_dict, read_yaml
from softvq.data.images import read_image
from softvq.errors import InputError
from softvq.files import read_tensors
from softvq.training.tokenizer_recipe import TokenizerRunConfig, expand_preset
from tests.security import zoo

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How a fork ended that read something."""

    code: int
    seconds: float
    mebibytes: float


def attempted(read: Callable[[], object]) -> Attempt:
    """Read something in a fork: code 0 if it was read, 2 if it was refused in a sentence, else something is wrong.

    The memory is what the process had at most, beyond what it began with.
    """
    ours, theirs = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.write(theirs, str(_resident()).encode())
            read()
            code = 0
        except InputError:
            code = 2
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    began = float(os.read(ours, 100))
    os.close(ours)
    os.close(theirs)
    return Attempt(os.waitstatus_to_exitcode(status), seconds, max(0.0, usage.ru_maxrss / 1024 - began))


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def refusals(reads: dict[str, Callable[[], object]]) -> Figures:
    """Read every file in a fork of its own."""
    attempts = {name: attempted(read) for name, read in reads.items()}
    return {
        "files": len(attempts),
        "refused": sum(attempt.code == 2 for attempt in attempts.values()),
        "not_refused": [name for name, attempt in attempts.items() if attempt.code != 2],
        "slowest_seconds": round(max(attempt.seconds for attempt in attempts.values()), 2),
        "most_mebibytes": round(max(attempt.mebibytes for attempt in attempts.values())),
    }


def pickles(folder: Path) -> Figures:
    """Open pickles as weights, under their own names and under false ones."""
    marker, reads = folder / "marker", {}
    for number, (name, data) in enumerate(zoo.pickles(marker).items()):
        for suffix in (".safetensors", ".pt"):
            path = folder / f"{number}{suffix}"
            path.write_bytes(data)
            reads[name + suffix] = lambda path=path: read_tensors(path)
    return {**refusals(reads), "ran": int(marker.exists())}


def safetensors(folder: Path) -> Figures:
    """Open files that no writer of safetensors makes."""
    reads = {}
    for number, (name, data) in enumerate(zoo.hostile_safetensors().items()):
        path = folder / f"{number}.safetensors"
        path.write_bytes(data)
        reads[name] = lambda path=path: read_tensors(path)
    return refusals(reads)


def configs(folder: Path) -> Figures:
    """Read recipes that name code, that unfold, or that ask for absurd sizes; no module may be imported for it."""
    marker, reads = folder / "marker", {}
    for number, (name, text) in enumerate(zoo.hostile_configs(marker).items()):
        path = folder / f"{number}.yaml"
        path.write_text(text)

        def read(path: Path = path) -> None:
            before = zoo.modules_now()
            try:
                from_dict(TokenizerRunConfig, expand_preset(read_yaml(path)), str(path))
            finally:
                if zoo.modules_now() != before:
                    os._exit(9)

        reads[name] = read
    return {**refusals(reads), "ran": int(marker.exists())}


def bombs() -> Figures:
    """Decode images that unfold."""
    return refusals({name: lambda data=data: read_image(data) for name, data in zoo.image_bombs().items()})


def formats() -> Figures:
    """Decode pictures of formats that are not allowed."""
    return refusals({name: lambda data=data: read_image(data) for name, data in zoo.disallowed_images().items()})


def mutated_images(count: int, seed: int = 0) -> Figures:
    """Decode changed copies: each is an image or a sentence."""
    return _mutated({name: (data, read_image) for name, data in zoo.whole_images().items()}, count, seed)


def mutated_safetensors(folder: Path, count: int, seed: int = 0) -> Figures:
    """Read changed copies of a small file: each is tensors or a sentence."""
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"b": "c"}}
    path = folder / "mutated.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_tensors(path)

    return _mutated({"safetensors": (zoo.safetensors_of(header, bytes(range(24))), read)}, count, seed)


def _mutated(wholes: dict[str, tuple[bytes, Callable[[bytes], object]]], count: int, seed: int) -> Figures:
    found: Figures = {"files": 0, "read": 0, "refused": 0, "slowest_seconds": 0.0}
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place, (whole, read) in enumerate(wholes.values()):
        for data in zoo.mutations(whole, count // len(wholes), seed + place):
            started = time.process_time()
            found["files"] += 1
            try:
                read(data)
                found["read"] += 1
            except InputError:
                found["refused"] += 1
            found["slowest_seconds"] = max(found["slowest_seconds"], round(time.process_time() - started, 2))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began
    return {**found, "most_mebibytes": round(grown / 1024)}
