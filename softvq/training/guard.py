"""What keeps a bad update away from the weights: on the device, so that the host never waits for a step.

An update is bad if its loss or the norm of a gradient is not finite or, where that is asked for, if a norm is far above
its running mean. It changes nothing, and the host is told when it looks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from softvq.config import check_finite
from softvq.errors import InputError, RunError
from softvq.training import distributed
from softvq.training.optim import copy_named

__all__ = ["ANOTHER_ORDER", "Guard", "GuardConfig"]

ANOTHER_ORDER = 1 << 31
"""Steps that lie between the samples of a run and those it is shown after a rollback: more than any run has."""
NORMS = ("grad_norm", "critic_grad_norm")
NORMS_KNOWN = 50
"""Updates before a norm can be called a spike."""
NORMS_REMEMBERED = 100
"""Updates over which the running mean of a norm goes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What is done about bad updates."""

    action: Literal["stop", "skip"] = "stop"
    """`stop` ends the run at the first; `skip` leaves it out, counts it and goes on."""
    spike_factor: float | None = None
    """An update is bad, too, if a gradient's norm is more than this many times its running mean; null for any norm."""
    max_bad_updates: int = 10
    """With `skip`, bad updates in a row after which the run goes back to its newest checkpoint, with other samples."""
    max_rollbacks: int = 3
    """How often it goes back before it stops."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_finite(self)
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise InputError(f"spike_factor is {self.spike_factor}, expected more than 1, or null")
        if self.max_bad_updates < 1:
            raise InputError(f"max_bad_updates is {self.max_bad_updates}, expected at least 1")
        if not 0 <= self.max_rollbacks <= 1000:
            raise InputError(f"max_rollbacks is {self.max_rollbacks}, expected 0 to 1000")


class Guard:
    """Judges updates and counts the bad ones, in tensors on the device.

    Args:
        config: What is bad, and how many are too many.
        device: Where the losses are.
        save_every: Steps between the checkpoints that a run may go back to.
    """

    def __init__(self, config: GuardConfig, device: torch.device, save_every: int) -> None:
        self.config = config
        self.limit = config.max_bad_updates if config.action == "skip" else 1
        self._in_a_row, self._total = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._first, self._failed = (torch.full((), -1, device=device) for _ in range(2))
        self._means = {name: torch.zeros(2, device=device) for name in NORMS}  # the mean, and of how many
        self._told = 0
        self.rollbacks = 0
        self.every = save_every if self.skips else 1

    @property
    def skips(self) -> bool:
        """Whether a run goes on after a bad update."""
        return self.config.action == "skip"

    @property
    def may_go_back(self) -> bool:
        """Whether a run with too many bad updates goes back to a checkpoint, instead of stopping."""
        return self.skips and self.rollbacks < self.config.max_rollbacks

    @property
    def shift(self) -> int:
        """Steps by which the samples are others than those of a run that never went back."""
        return self.rollbacks * ANOTHER_ORDER

    @property
    def saving_is_wrong(self) -> bool:
        """Whether the last update was bad, so that what one may go back to is of before; this waits for the device."""
        return int(self._in_a_row) > 0

    @property
    def info(self) -> dict[str, int]:
        """What a checkpoint has to know beside tensors: nothing in a run that never went back."""
        return {"rollbacks": self.rollbacks} if self.rollbacks else {}

    def judge(self, step: int, losses: list[Tensor], norms: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Judge an update, without a host sync; once too many were bad, all later ones are until the host looks.

        Args:
            step: Updates before it.
            losses: Scalars.
            norms: Of the gradients, by name.

        Returns:
            1 if the update must change nothing, else 0.
        """
        verdict = (~torch.stack([*losses, *norms.values()]).isfinite().all()).float()
        if self.config.spike_factor is not None:
            verdict = verdict.maximum(self._spiked(norms, self.config.spike_factor))
        bad = (distributed.max_over_ranks(verdict) > 0) | (self._failed >= 0)
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        self._total = self._total + bad
        self._first = torch.where(self._in_a_row == 1, step, self._first)
        too_many = (self._failed < 0) & (self._in_a_row >= self.limit)
        self._failed = torch.where(too_many, self._first, self._failed)
        if self.config.spike_factor is not None:
            self._remember(norms, bad)
        return bad.float()

    def look(self, warn: Callable[[str], None]) -> bool:
        """Look for bad updates; this waits for the device.

        Args:
            warn: Takes a sentence about those that were left out.

        Returns:
            Whether there were too many in a row.
        """
        before, self._told = self._told, int(self._total)
        if self.skips and self._told > before:
            warn(f"{self._told - before} bad updates were left out; {self._told} so far")
        return int(self._failed) >= 0

    def check(self, batch_size: int, last: Path | None) -> None:
        """Stop if there were too many bad updates in a row; this waits for the device.

        Args:
            batch_size: Of all ranks.
            last: The last good checkpoint, if there is one.

        Raises:
            RunError: Naming the step, the samples and that checkpoint.
        """
        step = int(self._failed)
        if step < 0:
            return
        what = "the loss or its gradient is not finite"
        if self.config.spike_factor is not None:
            what += f" or more than {self.config.spike_factor:g} times as large as usual"
        if self.limit > 1:
            what += f", {self.limit} times in a row and after going back {self.rollbacks} times"
        first = (self.shift + step) * batch_size
        found = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise RunError(
            f"step {step + 1}: {what}, on samples {first} to {first + self.limit * batch_size - 1}; "
            f"no weight was changed by it and {found}; lower optim.lr"
        )

    def report(self) -> dict[str, Tensor]:
        """Return what the log should say of it: nothing unless bad updates are skipped."""
        return {"skipped_updates": self._total.float()} if self.skips else {}

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run has to know: nothing where the first bad update ends it."""
        if not self.skips and self.config.spike_factor is None:
            return {}
        counts = {"in_a_row": self._in_a_row, "total": self._total, "first": self._first}
        return {**counts, **({f"mean.{name}": value for name, value in self._means.items()})}

    def load_state(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Forget everything, then take over what `state` and `info` were in a checkpoint."""
        self.rollbacks = int(info.get("rollbacks", 0))
        self._in_a_row, self._total = torch.zeros_like(self._in_a_row), torch.zeros_like(self._total)
        self._first, self._failed = torch.full_like(self._first, -1), torch.full_like(self._failed, -1)
        for mean in self._means.values():
            mean.zero_()
        if tensors and self.state():
            copy_named(self.state(), tensors, "guard")
        self._told = int(self._total)

    def _spiked(self, norms: Mapping[str, Tensor], factor: float) -> Tensor:
        means = torch.stack([self._means[name] for name in norms])
        found = torch.stack(list(norms.values()))
        return ((means[:, 1] >= NORMS_KNOWN) & (found > factor * means[:, 0])).any().float()

    def _remember(self, norms: Mapping[str, Tensor], skip: Tensor) -> None:
        for name, norm in norms.items():
            mean, count = self._means[name]
            moved = mean + (norm - mean) / (count + 1).clamp(max=NORMS_REMEMBERED)
            self._means[name] = torch.where(skip, self._means[name], torch.stack([moved, count + 1]))
