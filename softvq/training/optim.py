"""What moves weights: parameter groups, the learning rate as a function of the step, AdamW and Muon."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softvq.config import check_finite
from softvq.errors import InputError, RunError
from softvq.training import sharding
from softvq.training.muon import Muon
from softvq.training.sharded_muon import ShardedMuon

__all__ = ["OptimConfig", "Optimizer", "copy_named", "learning_rate", "parameter_groups"]

DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How weights are moved, and the schedule of the learning rate."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon` moves the matrices inside transformer blocks by Muon, at AdamW's scale of steps, and the rest by AdamW."""
    lr: float = 1e-4
    """Highest learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two running means."""
    weight_decay: float = 1e-4
    """Decay of the matrices of linear and convolution layers; nothing else is decayed."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises in a line from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""
    min_lr_ratio: float = 0.1
    """Where the cosine ends, as a fraction of `lr`."""
    grad_clip: float | None = 1.0
    """Largest norm of all gradients together; null leaves them as they are."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_finite(self)
        if not self.lr > 0:
            raise InputError(f"lr is {self.lr}, expected a positive number")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas is {list(self.betas)}, expected two numbers of at least 0 and below 1")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay is {self.weight_decay}, expected at least 0")
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps is {self.warmup_steps}, expected at least 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise InputError(f"min_lr_ratio is {self.min_lr_ratio}, expected 0 to 1")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise InputError(f"grad_clip is {self.grad_clip}, expected a positive number, or null for no clipping")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of the update that follows `step` finished ones.

        lr (step + 1) / warmup                         while step < warmup
        low + (lr - low) (1 + cos(pi progress)) / 2    after it, progress from 0 to 1, low = min_lr_ratio lr

    Args:
        config: Peak, warm-up and end.
        step: Updates already made, from 0.
        steps: Updates of the whole run.

    Returns:
        A positive number, at most `config.lr`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split the trainable parameters of a module by name into those to decay and those not to.

    Only the matrices of linear and convolution layers are decayed: pulling a bias, a norm, a LayerScale, a token, a
    position or a codeword towards zero regularises nothing.

    Args:
        module: Frozen parameters are left out.

    Returns:
        The decayed, and the rest.
    """
    matrices = {id(layer.weight) for layer in module.modules() if isinstance(layer, DECAYED)}
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decayed = {name: p for name, p in trainable.items() if id(p) in matrices}
    return decayed, {name: p for name, p in trainable.items() if name not in decayed}


class Optimizer:
    """AdamW, or Muon with it, over a module's trainable parameters; gradients clipped, state kept by parameter name.

    Args:
        module: What to train; its parameters are float32, whatever autocast does in the forward pass.
        config: Learning rate and the rest.
        steps: Updates of the whole run, where the schedule ends.
    """

    def __init__(self, module: nn.Module, config: OptimConfig, steps: int) -> None:
        decayed, rest = parameter_groups(module)
        self.config = config
        self.steps = steps
        self.parameters = {**decayed, **rest}
        assert all(p.dtype == torch.float32 for p in self.parameters.values()), "weights and their state are float32"
        self._sharded = any(map(sharding.is_spread, self.parameters.values()))
        self._parts = {name: sharding.local_parameter(p) for name, p in self.parameters.items()}
        muon = {name: p for name, p in decayed.items() if config.kind == "muon" and "blocks." in name and p.ndim == 2}
        by_adamw = [self._parts[name] for name in decayed if name not in muon]
        groups = [
            {"params": by_adamw, "weight_decay": config.weight_decay},
            {"params": [self._parts[name] for name in rest], "weight_decay": 0.0},
        ]
        self.adamw = _SkippableAdamW([group for group in groups if group["params"]], betas=config.betas, fused=True)
        self.muon: Muon | ShardedMuon | None = None
        self.by_muon = {name: self._parts[name] for name in muon}
        if muon and self._sharded:
            self.muon = ShardedMuon([(self._parts[name], p) for name, p in muon.items()], config.weight_decay)
        elif muon:
            self.muon = Muon(muon.values(), config.weight_decay)

    def clip_gradients(self) -> Float[Tensor, ""]:
        """Scale all gradients so that their norm is at most `grad_clip`, and return the norm they had."""
        limit = math.inf if self.config.grad_clip is None else self.config.grad_clip
        if self._sharded:
            return sharding.clip_gradients(self.parameters.values(), self._parts.values(), limit)
        return nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def update(self, step: int, skip: Float[Tensor, ""]) -> None:
        """Make one update and forget the gradients.

        Args:
            step: Updates already made, which decides the learning rate.
            skip: 1 to leave weights and state as they are, 0 to update; read on the device, so nothing waits.
        """
        lr = learning_rate(self.config, step, self.steps)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.found_inf = skip
        self.adamw.step()
        if self.muon is not None:
            self.muon.step(lr, skip)
        for parameter in (*self.parameters.values(), *self._parts.values()):
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return every tensor of the optimizer's state as `parameter.kind`, spread over the ranks as parameters are."""
        return {
            f"{name}.{kind}": sharding.as_spread(value, self.parameters[name])
            for name, part in self._parts.items()
            for kind, value in self._states(name)[part].items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        if self.muon is not None:
            self.muon.prepare()
        for name, parameter in self._parts.items():
            if name not in self.by_muon:
                self.adamw.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        copy_named(self.state(), tensors, "optimizer")

    def _states(self, name: str) -> dict[Tensor, dict[str, Tensor]]:
        return self.muon.state if self.muon is not None and name in self.by_muon else self.adamw.state


class _SkippableAdamW(torch.optim.AdamW):
    """The fused kernel leaves everything as it is when `found_inf` is one, on any device and without a host sync."""

    found_inf: Tensor


@torch.no_grad()
def copy_named(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors into tensors of the same names.

    Args:
        targets: Overwritten in place; of one that is spread over the ranks, this rank's part.
        sources: On any device.
        what: What they are, for errors.

    Raises:
        RunError: If a name is missing or too many, or a shape differs; nothing is copied then.
    """
    wrong = sorted(targets.keys() ^ sources.keys())
    wrong += [name for name in targets if name in sources and targets[name].shape != sources[name].shape]
    if wrong:
        raise RunError(f"{what} state does not fit this model: {', '.join(wrong[:5])} ({len(wrong)} tensors differ)")
    for name, target in targets.items():
        sharding.copy_into(target, sources[name])
