"""What to say when memory does not suffice: while computing what, and what to lower."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from softvq.errors import RunError

__all__ = ["enough_memory"]

REMEDIES = {
    "the forward pass of the model": "raise train.accumulate and resume",
    "the backward pass of the model": "raise train.accumulate and resume",
    "the forward pass of the critic": "raise train.accumulate, or set loss.adversarial.checkpoint, and resume",
    "the backward pass of the critic": "raise train.accumulate, or set loss.adversarial.checkpoint, and resume",
    "the health figures": "raise train.accumulate and resume",
    "the samples": "set train.sample_every to 0 and resume",
}
"""Fields of `run_folder.FREE_FIELDS`."""
OTHERWISE = "start a run with a smaller model or batch"


@contextlib.contextmanager
def enough_memory(step: int, phase: Callable[[], str]) -> Iterator[None]:
    """Turn what torch raises into a sentence that says in which phase the memory did not suffice.

    Args:
        step: Updates before it.
        phase: Returns what is being computed.

    Raises:
        RunError: In the place of torch's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # on the CPU torch has no class of its own for it
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        remedy = REMEDIES.get(phase(), OTHERWISE)
        raise RunError(f"step {step + 1}: out of memory in {phase()}; {remedy}") from error
