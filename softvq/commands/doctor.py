"""What this machine offers: `softvq doctor`."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from rich.table import Table

from softvq import __version__
from softvq.commands.common import results

__all__ = ["doctor"]

PACKAGES = ("torch", "torchvision", "timm", "safetensors", "huggingface_hub", "pillow", "numpy", "torchmetrics")
EXTRAS = (
    ("stlpips_pytorch", "train", "the weights of the perceptual loss"),
    ("tensorboard", "train", "TensorBoard logs"),
    ("datasets", "data", "Hugging Face data sets"),
    ("uvicorn", "serve", "the web app"),
)
"""Module, the extra of `pip install softvq[...]` it comes with, and what it gives."""


def doctor(arguments: argparse.Namespace) -> None:
    """Show versions, devices, what is installed or missing, and what will be slow."""
    console = results()
    for title, rows in (
        ("Versions", _versions()),
        ("Machine", _machine()),
        ("Optional", _optional()),
        ("Weights kept for offline use", _caches()),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    remarks = list(_remarks())
    for remark in remarks:
        console.print(f"- {remark}", soft_wrap=True)
    if not remarks:
        console.print("nothing here will be slow")


def _versions() -> Iterator[tuple[str, str]]:
    yield "softvq", __version__
    yield "python", platform.python_version()
    for name in PACKAGES:
        yield name, _installed(name) or "missing: pip install softvq"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Iterator[tuple[str, str]]:
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "cores", f"{_cores()} usable of {os.cpu_count()}, torch uses {torch.get_num_threads()}"
    yield "free disk here", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if properties.major >= 8 else "no bf16"
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"


def _optional() -> Iterator[tuple[str, str, str]]:
    for module, extra, gives in EXTRAS:
        is_here = importlib.util.find_spec(module) is not None
        yield module, gives, "installed" if is_here else f"missing: pip install 'softvq[{extra}]'"
    compiler = _compiler()
    yield "C++ compiler", "torch.compile on the CPU", compiler or "missing: install g++ or clang++"
    if torch.cuda.is_available():
        triton = importlib.util.find_spec("triton") is not None
        yield "triton", "torch.compile on the GPU", "installed" if triton else "missing: pip install triton"


def _caches() -> Iterator[tuple[str, str]]:
    hub = Path(HF_HUB_CACHE)
    yield "mode", "offline (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else "downloads what is missing"
    yield "folder", str(hub)
    folders = sorted(hub.glob("models--*")) if hub.is_dir() else []
    yield "models", ", ".join(folder.name.removeprefix("models--").replace("--", "/") for folder in folders) or "none"


def _remarks() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "no GPU: the tiny presets train in minutes here, the S, B and L presets need a GPU"
        if _compiler() is None:
            yield "no C++ compiler: leave train.compile off"
        if not any(flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16", "bf16")):
            yield "this CPU has no bf16 units: --precision bf16 would be slower than float32"
    elif not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "this GPU has no bf16 units: train in float32"
    if torch.get_num_threads() < _cores():
        yield f"torch uses {torch.get_num_threads()} of {_cores()} cores: unset OMP_NUM_THREADS to use all"


def _compiler() -> str | None:
    return next((name for name in ("g++", "clang++") if shutil.which(name)), None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_flags() -> set[str]:
    """Return the instruction sets Linux lists; on other systems, none are known."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return set()
    lines = (line for line in path.read_text(errors="replace").splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").partition(":")[2].split())
