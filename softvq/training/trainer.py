"""The loop: batches in, weights out, exact under any interruption.

Everything random is keyed by the seed and the step, so a checkpoint holds tensors and one integer, and a run that was
killed and resumed equals one that never stopped.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softvq.errors import InputError, Interrupted, RunError
from softvq.randomness import manual_seed
from softvq.ranks import is_main, world_size
from softvq.training import checkpoint as checkpoints
from softvq.training import distributed
from softvq.training.checkpoint import Checkpoint
from softvq.training.optim import Ema, OptimConfig, Optimizer, copy_named, learning_rate
from softvq.training.tracking import Display, RunLog, TensorBoard

__all__ = ["Task", "TrainConfig", "Trainer", "split"]

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
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: CUDA where there is one."""
    compile: bool = False
    """Compile the networks: minutes at the start, a faster step from then on."""
    log_every: int = 50
    """Steps between lines of the log."""
    save_every: int = 1000
    """Steps between checkpoints; there is always one at the end."""
    sample_every: int = 1000
    """Steps between sample grids; 0 makes none."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    tensorboard: bool = False
    """Write the log for TensorBoard as well."""

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
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}, expected at least 0 and below 1")


class Task(nn.Module):
    """What is learned from a batch; knows nothing of devices, precision, ranks or logs.

    A subclass sets `model`, the network that is trained, averaged and saved, and defines `forward`.
    """

    model: nn.Module

    def forward(self, batch: Any, step: int) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the loss and a report.

        Args:
            batch: A dataclass of tensors whose first dimension is the sample.
            step: Finished updates; everything scheduled depends on it alone.

        Returns:
            The mean over the samples of what to minimise, and scalars for people.
        """
        raise NotImplementedError

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the parts that take the time, in place; the step, a Python number, stays outside."""
        self.model.compile(*args, **kwargs)


class Trainer:
    """Runs a task for a number of steps.

    Args:
        task: What to learn; moved to the device.
        run: Folder of the run, whose lock the caller holds.
        config: How long and how often.
        optim: How to update.
        seed: Of the run.
        console: For people; silent on all ranks but the first.
        info: What to remember in every checkpoint, as JSON takes it.
        sample: Called on the first rank with the step, in evaluation mode and with the averaged weights in place;
            returns numbers for the log.
    """

    def __init__(
        self,
        task: Task,
        run: Path,
        config: TrainConfig,
        optim: OptimConfig,
        *,
        seed: int,
        console: Console,
        info: Mapping[str, Any] | None = None,
        sample: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        share = config.accumulate * world_size()
        if config.batch_size % share:
            raise InputError(
                f"batch_size is {config.batch_size}, expected a multiple of accumulate x processes ({share})"
            )
        self.device = distributed.choose_device(config.device)
        self.task = task.to(self.device)
        self.run, self.config, self.optim, self.seed = run, config, optim, seed
        self.console, self.info, self.sample = console, dict(info or {}), sample
        self.step = 0
        self.saved: Checkpoint | None = None
        self.optimizer = Optimizer(task.model, optim, config.steps)
        self.ema = Ema(task.model, config.ema_decay)
        self._failed_at = torch.full((), -1, device=self.device)  # the first update that was not finite
        if config.compile:
            task.compile()
        self._parallel: nn.Module = task
        if world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self._parallel = DistributedDataParallel(task, device_ids=devices, broadcast_buffers=False)

    def fit(self, batches: Callable[[int, int], Iterator[Any]]) -> None:
        """Train from the present step to the last.

        Args:
            batches: Called with the first step and the number of steps, yields this rank's part of each.

        Raises:
            Interrupted: On SIGINT or SIGTERM, after a checkpoint was written.
            RunError: If the loss or a gradient is not finite, memory runs out, or the last checkpoint is not written.
        """
        self.task.train()
        log = RunLog(self.run / "log.jsonl", self.step, self.warn) if is_main() else None
        board = TensorBoard(self.run, self.step, self.warn) if log and self.config.tensorboard else None
        display = Display(self.console, self.step, self.config.steps)
        pace = _Pace(self.step)
        with distributed.StopSignals() as stop, display.live():
            # begun here, so that data workers inherit the handlers and do not die of a signal to the whole group
            stream = batches(self.step, self.config.steps - self.step)
            while self.step < self.config.steps and not distributed.any_rank(stop.name is not None):
                batch = next(stream)
                report = self._update(batch)
                self.step += 1
                self._check_finite()
                display.advance(self.step)
                self._note_skipped(batch, log)
                if self._due(self.config.log_every):
                    self._log(report, pace, log, board, display)
                if self.sample and log and self._due(self.config.sample_every):
                    self._sample(log)
                if self._due(self.config.save_every):
                    self.save(log)
            interrupted = self.step < self.config.steps
            if interrupted:
                self.save(log)
        if board:
            board.close()
        if interrupted:
            where = f"saved at step {self.saved.step}" if self.saved else "nothing was saved yet"
            raise Interrupted(f"{self.run}: stopped by {stop.name} at step {self.step}, {where}; resume to go on")

    def _update(self, batch: Any) -> dict[str, Tensor]:
        """Make one update; return its report, which stays on the device."""
        manual_seed(self.seed, "model", self.step)
        report: dict[str, Tensor] = {}
        parts = split(batch, self.config.accumulate, self.device)
        try:
            for number, part in enumerate(parts, 1):
                with self._gradients_stay_here(number < len(parts)):
                    with self.autocast():
                        loss, terms = self._parallel(part, self.step)
                    (loss / len(parts)).backward()
                for name, value in {"loss": loss, **terms}.items():
                    report[name] = report.get(name, 0) + value.detach() / len(parts)
        except torch.OutOfMemoryError as error:
            message = f"step {self.step + 1}: the GPU is out of memory; raise train.accumulate and resume"
            raise RunError(message) from error
        report["grad_norm"] = self.optimizer.clip_gradients()
        self.optimizer.update(self.step, self._guard(report["loss"], report["grad_norm"]))
        self.ema.update(self.step + 1)
        return report

    def _guard(self, loss: Float[Tensor, ""], grad_norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return 1 from the first update on that is not finite, so that it and those after it change nothing."""
        bad = distributed.max_over_ranks((~(loss.isfinite() & grad_norm.isfinite())).float())
        first = (self._failed_at < 0) & (bad > 0)
        self._failed_at = torch.where(first, self.step, self._failed_at)
        return (self._failed_at >= 0).float()

    def _check_finite(self) -> None:
        """Stop if an update was not finite; on a GPU, where looking means waiting, only before something is kept."""
        keeping = (self.config.log_every, self.config.save_every, self.config.sample_every)
        if self.device.type == "cpu" or any(self._due(every) for every in keeping):
            self._refuse_failed()

    def _refuse_failed(self) -> None:
        failed = int(self._failed_at)
        if failed >= 0:
            first = failed * self.config.batch_size
            last_good = (
                f"the last good checkpoint is {self.saved.folder}" if self.saved else "there is no checkpoint yet"
            )
            raise RunError(
                f"step {failed + 1}: the loss or its gradient is not finite, on samples {first} to "
                f"{first + self.config.batch_size - 1}; no weight was changed by it and {last_good}; lower optim.lr"
            )

    def _log(
        self, report: dict[str, Tensor], pace: "_Pace", log: RunLog | None, board: TensorBoard | None, display: Display
    ) -> None:
        values = distributed.reduce_mean(report)
        values["lr"] = learning_rate(self.optim, self.step - 1, self.config.steps)
        seconds_per_step = pace.seconds_per_step(self.step)
        images_per_sec = self.config.batch_size / seconds_per_step
        display.report(self.step, values, images_per_sec, seconds_per_step * (self.config.steps - self.step))
        if log:
            log.write(self.step, values, clock={"time": time.time(), "images_per_sec": images_per_sec})
        if board:
            board.write(self.step, {**values, "images_per_sec": images_per_sec})

    def _sample(self, log: RunLog) -> None:
        assert self.sample is not None
        try:
            with self.averaged(), self.autocast():
                log.write(self.step, {"samples": self.sample(self.step)})
        except RunError as error:
            self.warn(str(error))

    def _note_skipped(self, batch: Any, log: RunLog | None) -> None:
        skipped = getattr(batch, "skipped", None)
        if skipped and log:
            log.write(self.step, {"skipped": list(skipped)})
            self.warn(f"step {self.step}: unreadable images were passed over: {', '.join(skipped)}")

    def save(self, log: RunLog | None = None) -> None:
        """Write a checkpoint of the present step, if there is none yet.

        On failure, a full disk for example, the ones before stay, a warning is given and the next save tries again.

        Args:
            log: Made safe on disk before, so that it never lacks lines that the checkpoint relies on.

        Raises:
            RunError: If the checkpoint that fails is the last one of the run, or an update before was not finite.
        """
        self._refuse_failed()
        if not is_main() or (self.saved and self.saved.step == self.step):
            return
        if log:
            log.sync()
        try:
            self.saved = checkpoints.save(self.run, self.step, self.state(), self.info, self.config.keep)
        except RunError as error:
            if self.step == self.config.steps:
                raise
            self.warn(f"{error}; training goes on and tries again at the next save")

    def state(self) -> dict[str, Tensor]:
        """Return every tensor a run is made of, by name."""
        parts = {"model": self.task.model.state_dict(), "optimizer": self.optimizer.state(), "ema": self.ema.state()}
        return {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}

    def restore(self, saved: Checkpoint) -> dict[str, Any]:
        """Go on from a checkpoint.

        Args:
            saved: Of a run of the same task.

        Returns:
            What else it remembers.

        Raises:
            RunError: If it is not of this model.
        """
        tensors, info = checkpoints.load(saved)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "ema": {}}
        for name, value in tensors.items():
            part, _, name = name.partition(".")
            parts[part][name] = value
        copy_named(self.task.model.state_dict(), parts["model"], "model")
        self.optimizer.load_state(parts["optimizer"])
        self.ema.load_state(parts["ema"])
        self.step, self.saved = saved.step, saved
        return info

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Lend the averaged weights to the model, in evaluation mode and without gradients."""
        with self.ema.in_place(), torch.no_grad():
            self.task.eval()
            try:
                yield
            finally:
                self.task.train()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of the forward pass."""
        on_gpu = self.device.type == "cuda"
        bf16 = self.config.precision == "bf16" or (self.config.precision == "auto" and on_gpu)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def warn(self, text: str) -> None:
        """Say something that does not stop the run."""
        self.console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager[object]:
        if wanted and isinstance(self._parallel, DistributedDataParallel):
            return self._parallel.no_sync()
        return contextlib.nullcontext()


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


class _Pace:
    """Seconds per step since it was last asked."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        before, self._step = self._step, step
        started, self._time = self._time, time.perf_counter()
        return (self._time - started) / max(1, step - before)
