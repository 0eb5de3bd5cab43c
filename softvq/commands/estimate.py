"""What a training will take: `softvq estimate`."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from softvq.backbones import compute_dtype
from softvq.commands.common import machine_name, messages, results
from softvq.commands.train import generator_recipe_of, read_recipe
from softvq.config import read_yaml
from softvq.errors import InputError
from softvq.evaluation.estimate import DEVICES, Estimate, estimate_generator, estimate_tokenizer
from softvq.evaluation.timing import matrix_peak
from softvq.training.distributed import choose_device

__all__ = ["estimate"]

MOST_PROCESSES = 1 << 16


def estimate(arguments: argparse.Namespace) -> None:
    """Print what a recipe takes, for this machine or a named one."""
    if not 0 < arguments.utilisation <= 1:
        raise InputError(f"--utilisation is {arguments.utilisation}, expected more than 0 and at most 1")
    if arguments.processes > MOST_PROCESSES:
        raise InputError(f"--processes is {arguments.processes}, expected at most {MOST_PROCESSES}")
    config, found = _estimated(arguments)
    peak, where, memory = _machine(arguments, config.train)
    pace = peak * arguments.utilisation
    seconds = found.seconds(pace, arguments.processes)
    report = {
        **dataclasses.asdict(found),
        "memory": found.memory,
        "processes": arguments.processes,
        "machine": where,
        "peak_flops": peak,
        "utilisation": arguments.utilisation,
        "images_per_sec": [found.images_per_second(phase, pace, arguments.processes) for phase in found.phases],
        "hours": seconds / 3600,
        "gpu_hours": seconds / 3600 * arguments.processes,
    }
    if arguments.json:
        results().print(json.dumps(report, indent=2), soft_wrap=True)
        return
    _print(found, report, memory)


def _estimated(arguments: argparse.Namespace) -> tuple[Any, Estimate]:
    path = Path(arguments.config)
    model = read_yaml(path).get("model")
    if isinstance(model, dict) and _is_generator(model):
        shape = {"num_tokens": arguments.tokens, "latent_dim": arguments.dim, "num_classes": arguments.classes}
        config: Any = generator_recipe_of(path, arguments.overrides, {}, shape)
        work: Callable[[Any, int], Estimate] = estimate_generator
    else:
        config, work = read_recipe(path, arguments.overrides, {}), estimate_tokenizer
    share = config.train.accumulate * arguments.processes
    if config.train.batch_size % share:
        size = config.train.batch_size
        raise InputError(f"batch_size is {size}, expected a multiple of accumulate x processes ({share})")
    with messages().status("going through updates without numbers"):
        return config, work(config, arguments.processes)


def _is_generator(model: dict[str, Any]) -> bool:
    preset = model.get("preset")
    return "network" in model or (isinstance(preset, str) and preset.split("-")[0] in {"sit", "dit", "mar"})


def _machine(arguments: argparse.Namespace, train: Any) -> tuple[float, str, int | None]:
    """Return the peak in operations a second, whose it is, and how much memory there is, if that is known."""
    if arguments.device_name is not None:
        device = DEVICES[arguments.device_name]
        low = train.precision != "fp32"
        return device.bf16 if low else device.fp32, f"{arguments.device_name}, published peak", device.memory
    here = choose_device(arguments.device)
    dtype = compute_dtype(train.precision, here)
    memory = torch.cuda.get_device_properties(here).total_memory if here.type == "cuda" else None
    kind = str(dtype).removeprefix("torch.")
    return matrix_peak(here, dtype), f"{machine_name(here)}, measured on a large {kind} matrix product", memory


def _print(found: Estimate, report: dict[str, Any], memory: int | None) -> None:
    table = Table("phase", "updates", "GFLOP/image", "images/s", "s/update")
    for phase, pace in zip(found.phases, report["images_per_sec"], strict=True):
        row = (f"{phase.steps:,}", f"{phase.flops / 1e9:,.1f}", f"{pace:,.4g}", f"{found.batch_size / pace:,.4g}")
        table.add_row(phase.name, *row)
    console = results()
    console.print(f"{found.trained:,} parameters are trained, {found.frozen:,} are frozen")
    console.print(table)
    sizes = Table("memory of a process", "GiB")
    for name in ("weights", "gradients", "optimizer", "averages", "activations", "memory"):
        sizes.add_row("all" if name == "memory" else name, f"{getattr(found, name) / 2**30:.2f}")
    console.print(sizes)
    if memory is not None and found.memory > memory:
        console.print(
            f"more than the {memory / 2**30:.1f} GiB there are: raise train.accumulate, or set "
            "train.activation_checkpointing or, for several processes, train.shard"
        )
    processes = report["processes"]
    console.print(
        f"{report['machine']}: {report['peak_flops'] / 1e12:,.4g} TFLOP/s, of which {report['utilisation']:.0%} are "
        f"assumed to be reached; {processes} process{'es' if processes > 1 else ''}",
        soft_wrap=True,
    )
    console.print(
        f"{report['hours']:,.4g} hours, {report['gpu_hours']:,.4g} GPU hours for the whole run", soft_wrap=True
    )
