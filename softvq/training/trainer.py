"""The loop: batches in, weights out, exact under any interruption.

Everything random is keyed by the seed and the step, so a checkpoint holds tensors and one integer, and a run that was
killed and resumed equals one that never stopped.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softvq.backbones import compute_dtype
from softvq.errors import InputError, Interrupted, RunError
from softvq.randomness import manual_seed
from softvq.ranks import is_main, mean_over_ranks, world_size
from softvq.training import checkpoint as checkpoints
from softvq.training import distributed, sharding
from softvq.training.averages import Averages
from softvq.training.blocks import recompute_activations
from softvq.training.checkpoint import Checkpoint
from softvq.training.guard import Guard
from softvq.training.memory import enough_memory
from softvq.training.optim import OptimConfig, Optimizer, copy_named, learning_rate
from softvq.training.recording import Recorder
from softvq.training.reports import Reports
from softvq.training.task import Task, split
from softvq.training.trackers import check_trackers
from softvq.training.train_config import TrainConfig

__all__ = ["Trainer"]

BETWEEN = "the optimizer or the transfer of a batch"


class Trainer:
    """Runs a task for a number of steps.

    Args:
        task: What to learn; moved to the device.
        run: Folder of the run, whose lock the caller holds.
        config: How long and how often.
        optim: How to update.
        seed: Of the run.
        console: For people; silent on all ranks but the first.
        critic_optim: How to update the task's critic, if it has one; as `optim` by default.
        info: What to remember in every checkpoint, as JSON takes it.
        sample: Called on the first rank with the step, the averaged weights in place; returns numbers for the log.
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
        critic_optim: OptimConfig | None = None,
        info: Mapping[str, Any] | None = None,
        sample: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        share = config.accumulate * world_size()
        if config.batch_size % share:
            size = config.batch_size
            raise InputError(f"batch_size is {size}, expected a multiple of accumulate x processes ({share})")
        check_trackers(config.trackers)
        self.device = distributed.choose_device(config.device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same, so trying out convolutions pays
        self.task = task.to(self.device)
        if config.activation_checkpointing:
            recompute_activations(task.model)
        self.sharded = config.shard == "fsdp" and world_size() > 1
        if self.sharded:
            sharding.shard_task(task, self.device, compute_dtype(config.precision, self.device))
        self.run, self.config, self.optim, self.seed = run, config, optim, seed
        self.console, self.info, self.sample = console, dict(info or {}), sample
        self.step = 0
        self.saved: Checkpoint | None = None
        self.optimizer = Optimizer(task.model, optim, config.steps)
        self.averages = Averages(task.model, config.ema_decay, config.more_ema_decays, config.ema_lengths)
        self.critic_optimizer = None
        if task.critic is not None:
            task.critic.to(self.device)
            self.critic_optimizer = Optimizer(task.critic, critic_optim or optim, config.steps)
        self.guard, self._phase = Guard(config.guard, self.device, config.save_every), BETWEEN
        if config.compile:
            task.compile()
        if config.cuda_graph and world_size() > 1:
            raise InputError("cuda_graph is true, which needs a single process; set it to false under torchrun")
        self._recorder = None
        if config.cuda_graph and self.device.type == "cuda":
            critic = self.critic_optimizer.parameters if self.critic_optimizer else {}
            self._recorder = Recorder(self._differentiate, [*self.optimizer.parameters.values(), *critic.values()])
        self._sampled = distributed.any_rank(sample is not None)
        self._parallel = task if self.sharded else self._distributed(task)
        self._parallel_critic = None if task.critic is None else self._distributed(task.critic)

    def fit(self, batches: Callable[[int, int], Iterator[Any]]) -> None:
        """Train from the present step to the last.

        Args:
            batches: Called with the first step and the number of steps, yields this rank's part of each.

        Raises:
            Interrupted: On SIGINT, SIGTERM or SIGHUP, after a checkpoint was written.
            RunError: If the loss or a gradient is not finite, memory runs out, or the last checkpoint is not written.
        """
        self.task.train()
        config, main, board = self.config, is_main(), is_main() and self.config.tensorboard
        place = self.run, self.step, config.steps, config.batch_size, self.console
        reports = Reports(*place, main, board, self.warn, config.trackers)
        with distributed.StopSignals() as stop, reports.live():
            # begun here, so that data workers inherit the handlers and do not die of a signal to the whole group
            stream = self._stream(batches)
            while self.step < config.steps and (wish := distributed.largest(stop.wish)) < distributed.STOP:
                if wish == distributed.SAVE:
                    stop.checkpoint = False
                    self.save(reports)
                batch = next(stream)
                report = self.update(batch)
                self.step += 1
                if self._must_go_back():
                    self._go_back(reports)
                    stream = self._stream(batches)
                    continue
                reports.display.advance(self.step)
                reports.skipped(self.step, getattr(batch, "skipped", ()))
                if self._due(config.log_every):
                    self._log({**report, **self._health(batch)}, reports)
                if self._sampled and (main or self.sharded) and self._due(config.sample_every):
                    self._sample(reports)
                if self._due(config.save_every):
                    self.save(reports)
            if self.step < config.steps:
                self.save(reports)
                where = f"saved at step {self.saved.step}" if self.saved else "nothing was saved yet"
                raise Interrupted(f"{self.run}: stopped by {stop.by} at step {self.step}, {where}; resume to go on")

    def update(self, batch: Any) -> dict[str, Tensor]:
        """Make one update, leaving `step` as it is.

        Args:
            batch: This rank's part of it.

        Returns:
            The losses and other scalars, which stay on the device.

        Raises:
            RunError: If the memory of a GPU does not suffice.
        """
        manual_seed(self.seed, "model", self.step)
        report: dict[str, Tensor] = {}
        optimizers, scheduled = {"grad_norm": self.optimizer}, self.task.scheduled(self.step)
        if self.critic_optimizer is not None and self.task.critic_counts(self.step):
            optimizers["critic_grad_norm"] = self.critic_optimizer
        with enough_memory(self.step, lambda: self._phase):
            parts = split(batch, self.config.accumulate, self.device)
            for number, part in enumerate(parts, 1):
                if self._recorder is not None:
                    losses, terms = self._recorder(self.task.phase(self.step), part, scheduled)
                else:
                    losses, terms = self._differentiate(part, scheduled, last=number == len(parts))
                for name, value in {**losses, **terms}.items():
                    report[name] = report.get(name, 0) + value.detach() / len(parts)
            self._phase = BETWEEN
            norms = {name: optimizer.clip_gradients() for name, optimizer in optimizers.items()}
            losses = [report[name] for name in ("loss", "critic_loss") if name in report]
            skip = self.guard.judge(self.step, losses, norms)
            for optimizer in optimizers.values():
                optimizer.update(self.step, skip)
            self.averages.update(self.step + 1, skip if self.guard.skips else None)
        return {**report, **norms, **self.guard.report()}

    def _differentiate(
        self, part: Any, scheduled: Mapping[str, Tensor | float], *, last: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add a micro-batch's gradients, the critic's after the model's, whose activations are free by then."""
        share, self._phase = self.config.accumulate, "the forward pass of the model"
        with self._gradients_stay_here(self._parallel, not last):
            with self.autocast():
                loss, terms, made = self._parallel(part, self.step, scheduled)
            self._phase = "the backward pass of the model"
            (loss / share).backward()
        sharding.put_away(self.task)
        losses = {"loss": loss.detach()}
        if self._parallel_critic is not None and self.task.critic_counts(self.step):
            self._phase = "the forward pass of the critic"
            with self._gradients_stay_here(self._parallel_critic, not last):
                with self.autocast():
                    loss, more = self._parallel_critic(*made)
                self._phase = "the backward pass of the critic"
                (loss / share).backward()
            losses["critic_loss"], terms = loss.detach(), {**terms, **more}
        return losses, terms

    def _stream(self, batches: Callable[[int, int], Iterator[Any]]) -> Iterator[Any]:
        return batches(self.guard.shift + self.step, self.config.steps - self.step)

    def _must_go_back(self) -> bool:
        """Look for bad updates; on a GPU, where looking means waiting, only before something is kept."""
        keeping = (self.config.log_every, self.config.save_every, self.config.sample_every)
        if self.device.type != "cpu" and not any(self._due(every) for every in keeping):
            return False
        failed = self.guard.look(lambda text: self.warn(f"step {self.step}: {text}"))
        if failed and not self.guard.may_go_back:
            self.check_finite()
        return failed

    def check_finite(self) -> None:
        """Raise a RunError if there were more bad updates than may be; this waits for the device."""
        self.guard.check(self.config.batch_size, self.saved.folder if self.saved else None)

    def _go_back(self, reports: Reports) -> None:
        """Go on from the newest checkpoint, with other samples; all ranks come here at the same step."""
        failed, times = self.step, self.guard.rollbacks + 1
        distributed.wait_for_all()
        # not one that a signal left: without that signal the run would go another way
        if saved := checkpoints.latest(self.run, self.config.save_every):
            self.restore(saved)
        self.check_finite()
        distributed.wait_for_all()
        if is_main():
            checkpoints.discard_after(self.run, self.step)
        self.guard.rollbacks = times
        self.warn(f"step {failed}: too many bad updates; goes on from step {self.step} with other samples")
        reports.start_at(self.step)
        # of the next step: a run that is killed before it saves goes back once more, and then says so once more
        reports.note(self.step + 1, {"rollbacks": times, "from_step": failed})

    def _log(self, report: dict[str, Tensor], reports: Reports) -> None:
        values = distributed.reduce_mean(report)
        reports.warn_once(self.step, self.task.warnings(values))
        values["lr"] = learning_rate(self.optim, self.step - 1, self.config.steps)
        reports.line(self.step, values)

    def _sample(self, reports: Reports) -> None:
        try:
            with enough_memory(self.step, lambda: "the samples"), self.averaged(), self.autocast():
                if self.sample and is_main():
                    reports.note(self.step, {"samples": self.sample(self.step)})
        except (InputError, RunError) as error:
            self.warn(str(error))

    def save(self, reports: Reports | None = None) -> None:
        """Write a checkpoint of the present step, if there is none yet.

        On failure, a full disk for example, the ones before stay, a warning is given and the next save tries again.

        Args:
            reports: Whose log is made safe on disk before, so that no lines are missing that the checkpoint relies on.

        Raises:
            RunError: If the checkpoint that fails is the last one of the run, or an update before was not finite.
        """
        if not self.guard.skips:
            self.check_finite()
        elif self.step < self.config.steps and self.guard.saving_is_wrong:
            return
        is_saved = self.saved is not None and self.saved.step == self.step
        if distributed.any_rank(is_saved) if self.sharded else is_saved or not is_main():
            return
        try:
            tensors = self.state()
            if self._due(self.config.save_every):  # so that a run that was stopped keeps those of one that was not
                self.averages.save_snapshot(self.run, self.step)
            if reports and is_main():
                reports.sync(last=self.step == self.config.steps)
            if is_main():
                info = {**self.info, **self.guard.info, **(reports.score(self.config.keep_best) if reports else {})}
                self.saved = checkpoints.save(self.run, self.step, tensors, info, self.config.keep, self.guard.every)
        except RunError as error:
            if self.step == self.config.steps:
                raise
            self.warn(f"{error}; training goes on and tries again at the next save")

    def state(self) -> dict[str, Tensor]:
        """Return every tensor a run is made of, by name; whole, if they are sharded, and on the first rank alone."""
        parts = {"model": self.task.model.state_dict(), "optimizer": self.optimizer.state(), **self.averages.state()}
        if self.task.critic is not None and self.critic_optimizer is not None:
            parts |= {"critic": self.task.critic.state_dict(), "critic_optimizer": self.critic_optimizer.state()}
        parts["guard"] = self.guard.state()
        named = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
        return sharding.gathered(named)

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
        parts: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
        for (part, _, name), value in ((name.partition("."), value) for name, value in tensors.items()):
            parts[part][name] = value
        copy_named(self.task.model.state_dict(), parts["model"], "model")
        self.optimizer.load_state(parts["optimizer"])
        self.averages.load_state(parts)
        critic = {} if self.task.critic is None else self.task.critic.state_dict()
        copy_named(critic, parts["critic"], "critic")
        if self.critic_optimizer is not None and parts["critic_optimizer"]:  # without, it has not begun
            self.critic_optimizer.load_state(parts["critic_optimizer"])
        self.guard.load_state(parts["guard"], info)
        self.step, self.saved = saved.step, saved
        return info

    @contextlib.contextmanager
    def averaged(self, name: str | None = None) -> Iterator[None]:
        """Lend the main average or the one of a name to the model, in evaluation mode and without gradients.

        Where it is sharded, all ranks enter and leave, and the first one has what it computes with.
        """
        lent = self.averages.named(name).in_place(), sharding.whole(self.task), torch.no_grad()
        with lent[0], lent[1], lent[2], contextlib.ExitStack() as stack:
            stack.callback(self.task.train)
            self.task.eval()
            yield

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of the forward pass."""
        low = compute_dtype(self.config.precision, self.device) == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)

    def warn(self, text: str) -> None:
        """Say something that does not stop the run."""
        self.console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _distributed(self, module: nn.Module) -> nn.Module:
        if world_size() == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    def _gradients_stay_here(self, module: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[object]:
        if wanted and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()

    @torch.no_grad()
    def _health(self, batch: Any) -> dict[str, Tensor]:
        """Return the task's figures over the whole batch of all ranks."""
        averages: dict[str, Tensor] = {}
        for part in split(batch, self.config.accumulate, self.device):
            with enough_memory(self.step, lambda: "the health figures"), self.autocast():
                found = self.task.health(part)
            sharding.put_away(self.task)
            for name, value in found.items():
                averages[name] = averages.get(name, 0) + value / self.config.accumulate
        return self.task.figures({name: mean_over_ranks(value) for name, value in averages.items()})
