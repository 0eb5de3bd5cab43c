"""What every training has: how long, on what, and how often to say and save something."""

import dataclasses
from typing import Literal

from softvq.errors import InputError
from softvq.training.averages import check_averages
from softvq.training.guard import GuardConfig

__all__ = ["TrainConfig"]

MAX_BATCH_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long to train, on what, and how often to say and save something."""

    batch_size: int = 256
    """Images of one update, over all devices and micro-batches together."""
    steps: int = 250_000
    """Updates of the whole run."""
    accumulate: int = 1
    """Micro-batches that one update is split into, to save memory; a divisor of `batch_size`."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass: bf16 autocast or float32; auto is bf16 on CUDA. Weights and their state stay float32."""
    ema_decay: float = 0.9999
    """Decay of the average of the weights, which is what is saved for use."""
    more_ema_decays: tuple[float, ...] = ()
    """Decays of further averages, which are kept beside the main one."""
    ema_lengths: tuple[float, ...] = ()
    """Relative lengths of power-function averages, e.g. 0.05 and 0.1; every checkpoint leaves them in `averages/`."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: CUDA where there is one."""
    compile: bool = False
    """Compile the networks: minutes at the start, a faster step from then on."""
    cuda_graph: bool = False
    """Record what a GPU does in a step and replay it, so that it never waits for the CPU; for one process and
    `accumulate: 1`. Each phase keeps gradients of its own. On the CPU it does nothing."""
    shard: Literal["none", "fsdp"] = "none"
    """`fsdp` spreads weights, gradients, their optimizer's state and averages over the processes instead of copying
    them to each; for models that are large beside their activations. Alone, a process keeps everything."""
    activation_checkpointing: bool = False
    """Compute what happens within transformer blocks again in the backward pass instead of keeping it: less memory,
    about a third more time, equal results."""
    log_every: int = 50
    """Steps between lines of the log."""
    save_every: int = 1000
    """Steps between checkpoints; there is always one at the end."""
    sample_every: int = 1000
    """Steps between sample grids; 0 makes none."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_best: Literal["loss", "psnr"] | None = None
    """Also keep the checkpoint with the lowest loss, or the highest PSNR of the samples, in the log; null for none."""
    tensorboard: bool = False
    """Write the log for TensorBoard as well."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Others to report to, with the `trackers` extra; what goes wrong with them costs a warning."""
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """What is done about updates that are not finite, or far too large."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("batch_size", "steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.batch_size > MAX_BATCH_SIZE:
            raise InputError(f"batch_size is {self.batch_size}, expected at most {MAX_BATCH_SIZE}")
        if self.sample_every < 0:
            raise InputError(f"sample_every is {self.sample_every}, expected at least 0")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate is {self.accumulate}, expected a divisor of batch_size ({self.batch_size})")
        if self.cuda_graph and self.accumulate > 1:
            raise InputError(f"cuda_graph is true, which needs accumulate 1; it is {self.accumulate}")
        check_averages(self.ema_decay, self.more_ema_decays, self.ema_lengths)
