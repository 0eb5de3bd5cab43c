"""A task with a critic: when it is trained, what it may not touch, and that it is saved and resumed with the rest."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from softvq.errors import RunError
from softvq.training.checkpoint import latest
from softvq.training.optim import OptimConfig
from softvq.training.task import Task
from softvq.training.tracking import read_log
from softvq.training.train_config import TrainConfig
from softvq.training.trainer import Trainer

START = 4


@dataclasses.dataclass
class Points:
    inputs: Tensor


class Judge(nn.Module):
    """Tells numbers from made ones; `spoil` makes its loss infinite at that call."""

    def __init__(self, spoil: int = -1) -> None:
        super().__init__()
        self.scores = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.spoil = spoil

    def forward(self, made: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        loss = self.scores(made).mean() - self.scores(real).mean() + 0.1 * self.scores.weight.square().sum()
        if int(self.calls) == self.spoil:
            loss = loss * float("inf")
        return loss, {"judged": self.scores(made).detach().mean()}


class Forger(Task):
    def __init__(self, spoil: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(3, 3)
        self._critic = (Judge(spoil),)

    @property
    def critic(self) -> Judge:
        return self._critic[0]

    def critic_counts(self, step: int) -> bool:
        return step >= START

    def health(self, batch: Points) -> dict[str, Tensor]:
        return {"mean": self.model(batch.inputs).mean()}

    def figures(self, averages: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"twice": 2 * averages["mean"]}

    def warnings(self, figures: dict[str, float]) -> dict[str, str]:
        return {"always": "something is odd"}

    def forward(
        self, batch: Points, step: int, scheduled: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        made = self.model(batch.inputs)
        loss = (made - batch.inputs.flip(1)).square().mean()
        return loss, {}, (made.detach(), batch.inputs)


def points(start: int, count: int) -> Iterator[Points]:
    for step in range(start, start + count):
        yield Points(torch.randn(8, 3, generator=torch.Generator().manual_seed(step)))


def trainer(run: Path, console: Console | None = None, spoil: int = -1, **changes: object) -> Trainer:
    run.mkdir(exist_ok=True)
    settings = {"batch_size": 8, "steps": 12, "log_every": 1, "save_every": 3, "sample_every": 0, "device": "cpu"}
    config = TrainConfig(**{**settings, "ema_decay": 0.9, **changes})
    optims = {"critic_optim": OptimConfig(lr=1e-2, schedule="constant")}
    return Trainer(
        Forger(spoil), run, config, OptimConfig(lr=1e-3), seed=0, console=console or Console(quiet=True), **optims
    )


def test_the_critic_waits_and_then_moves_by_its_own_optimizer(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    before = {name: value.clone() for name, value in ours.task.critic.state_dict().items()}
    stream = points(0, 12)
    for step in range(START):
        report = ours.update(next(stream))
        ours.step = step + 1
        assert "critic_loss" not in report
    assert all(torch.equal(before[name], value) for name, value in ours.task.critic.state_dict().items())
    report = ours.update(next(stream))
    assert {"critic_loss", "critic_grad_norm", "judged"} <= report.keys()
    moved = (ours.task.critic.scores.weight - before["scores.weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-2, atol=0)  # AdamW's first step is its rate
    assert "critic" not in " ".join(name for name, _ in ours.task.named_parameters())


def test_a_run_with_a_critic_resumes_exactly(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.fit(points)
    for stop in (3, 6):  # before and after the critic's first step
        part = trainer(tmp_path / f"part{stop}", steps=12)
        stream = points(0, 12)
        for step in range(stop):
            part.update(next(stream))
            part.step = step + 1
        part.save()
        resumed = trainer(tmp_path / f"part{stop}")
        found = latest(tmp_path / f"part{stop}")
        assert found is not None
        resumed.restore(found)
        resumed.fit(points)
        ours, theirs = resumed.state(), whole.state()
        assert ours.keys() == theirs.keys()
        assert "critic_optimizer.scores.weight.exp_avg" in ours
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulating_changes_the_critic_by_rounding_alone(tmp_path: Path, accumulate: int) -> None:
    whole, parts = trainer(tmp_path / "a"), trainer(tmp_path / "b", accumulate=accumulate)
    for ours in (whole, parts):
        ours.fit(points)
    ours, theirs = parts.task.critic.scores.weight, whole.task.critic.scores.weight
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_critic_that_is_not_finite_stops_both(tmp_path: Path) -> None:
    ours = trainer(tmp_path, spoil=3)  # at step START + 2
    with pytest.raises(RunError, match=f"step {START + 3}: the loss or its gradient is not finite"):
        ours.fit(points)
    good = trainer(tmp_path / "good")
    stream = points(0, 12)
    for step in range(START + 2):
        good.update(next(stream))
        good.step = step + 1
    state = {name: value for name, value in ours.state().items() if name != "critic.calls"}
    assert all(torch.equal(value, good.state()[name]) for name, value in state.items() if not name.startswith("ema"))


def test_health_and_warnings_reach_the_log_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = trainer(tmp_path, Console(width=200))
    ours.fit(points)
    assert capsys.readouterr().out.count("warning: step 1: something is odd") == 1
    assert all("twice" in line for line in read_log(tmp_path / "log.jsonl"))
    last = next(points(11, 1))
    expected = 2 * ours.task.model(last.inputs).mean()
    assert read_log(tmp_path / "log.jsonl")[-1]["twice"] == pytest.approx(expected.item(), rel=1e-5)
