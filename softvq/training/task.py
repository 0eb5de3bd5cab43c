"""What the loop asks of a task: a loss for a batch, and, if it has a critic, something for that to judge."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Task", "split"]


class Task(nn.Module):
    """What is learned from a batch; knows nothing of devices, precision, ranks or logs.

    A subclass sets `model`, the network that is trained, averaged and saved, and defines `forward`. If it has a
    `critic`, that is trained against it, by an optimizer of its own.
    """

    model: nn.Module

    @property
    def critic(self) -> nn.Module | None:
        """A network that judges what the model made: called with it, returns its own loss and a report."""
        return None

    def critic_counts(self, step: int) -> bool:
        """Return whether the critic is trained after `step` updates; until then it is not called."""
        return False

    def scheduled(self, step: int) -> dict[str, float]:
        """Return the numbers that change from step to step, such as the weight of a term in its warm-up."""
        return {}

    def phase(self, step: int) -> Hashable:
        """Return what decides, after `step` updates, which computations are done; equal phases do the same ones."""
        return None

    def forward(
        self, batch: Any, step: int, scheduled: Mapping[str, Tensor | float]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor], Any]:
        """Return the loss, a report, and what the critic is to judge.

        Args:
            batch: A dataclass of tensors whose first dimension is the sample.
            step: Finished updates, which may be looked at for the phase alone.
            scheduled: As `scheduled(step)` gives them, as floats or as tensors.

        Returns:
            The mean over the samples of what to minimise, scalars for people, and the arguments of the critic.
        """
        raise NotImplementedError

    def health(self, batch: Any) -> dict[str, Tensor]:
        """Return means over a batch's samples that tell how the model is; looked at when the log is written."""
        return {}

    def figures(self, averages: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scalars for people from means of `health`, which were averaged over parts and ranks."""
        return {}

    def warnings(self, figures: Mapping[str, float]) -> dict[str, str]:
        """Return a sentence, by its kind, for each thing in a line of the log that people should know."""
        return {}

    def compile(self, **options: Any) -> None:
        """Compile the parts that take the time, in place; the step, a Python number, stays outside."""
        self.model.compile(**options)


def split(batch: Any, parts: int, device: torch.device) -> list[Any]:
    """Return a batch on a device, in equal parts along the samples.

    Args:
        batch: A dataclass; its tensors are split, its other fields repeated.
        parts: A divisor of the number of samples.
        device: Where to.

    Returns:
        As many batches of the same kind.
    """
    names = [field.name for field in dataclasses.fields(batch) if isinstance(getattr(batch, field.name), Tensor)]
    columns = {name: getattr(batch, name).to(device, non_blocking=True).chunk(parts) for name in names}
    return [dataclasses.replace(batch, **{name: columns[name][i] for name in names}) for i in range(parts)]
