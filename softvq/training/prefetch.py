"""The next batch on its way to a GPU while the present one is computed on."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["on_device"]


def on_device(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Return the same batches, each copied to a GPU on a stream of its own while the one before is computed on.

    From page-locked memory, where the data loader puts batches, the copy runs beside the computation. What a batch
    holds, and after which one an error is raised, stays the same.

    Args:
        batches: Dataclasses with tensors.
        device: Where to; on the CPU nothing is done.

    Returns:
        Batches of the same kind with their tensors on the device.
    """
    return batches if device.type != "cuda" else _ahead(batches, device)


def _ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    stream = torch.cuda.Stream(device)
    present = _sent(batches, device, stream)
    while present is not None:
        following = _sent(batches, device, stream)
        if isinstance(present, Exception):
            raise present
        computing = torch.cuda.current_stream(device)
        computing.wait_event(present.copied)
        for tensor in _tensors(present.batch).values():
            tensor.record_stream(computing)  # so that its memory is not given away while it is still read
        yield present.batch
        present = following


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    batch: Any
    copied: Any


def _sent(batches: Iterator[Any], device: torch.device, stream: Any) -> _Sent | Exception | None:
    """Begin to copy the next batch; return its error instead, for when its turn comes, or None after the last."""
    try:
        batch = next(batches, None)
    except Exception as error:  # whatever it is, it is raised in its turn
        return error
    if batch is None:
        return None
    with torch.cuda.stream(stream):
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in _tensors(batch).items()}
        copied = torch.cuda.Event()
        copied.record(stream)
    return _Sent(dataclasses.replace(batch, **moved), copied)


def _tensors(batch: Any) -> dict[str, Tensor]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}
