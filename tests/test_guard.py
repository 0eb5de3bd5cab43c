"""Bad updates: what is left out, when a run goes back, and that all of it is exact under any interruption."""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from softvq.errors import InputError, Interrupted, RunError
from softvq.training.checkpoint import latest
from softvq.training.guard import ANOTHER_ORDER, GuardConfig
from softvq.training.memory import enough_memory
from tests.test_trainer import BATCH, Points, Regression, lines, points, states_equal, trainer

SKIP = GuardConfig(action="skip", max_bad_updates=3, max_rollbacks=2)


def spoiled(bad: set[int], how: float = math.nan) -> Callable[[int, int], Iterator[Points]]:
    """Return a stream whose samples of some steps are not finite, or far too large."""

    def stream(start: int, count: int) -> Iterator[Points]:
        for step in range(start, start + count):
            batch = next(points(step, 1))
            yield Points(batch.inputs, batch.targets * how if step in bad else batch.targets)

    return stream


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(part)}


@pytest.mark.parametrize("how", [math.nan, math.inf])
def test_a_bad_update_leaves_weights_optimizer_and_averages_alone(tmp_path: Path, how: float) -> None:
    ours = trainer(tmp_path, guard=SKIP, more_ema_decays=(0.5,), ema_lengths=(0.1,))
    stream = spoiled({4}, how)(0, 6)
    for step in range(6):
        before = {name: value.clone() for name, value in without(ours.state(), "guard").items()}
        report = ours.update(next(stream))
        ours.step += 1
        assert states_equal(before, without(ours.state(), "guard")) == (step == 4)
        assert float(report["skipped_updates"]) == (step >= 4)
    assert all(value.isfinite().all() for value in ours.state().values())


def test_while_nothing_is_bad_the_guard_changes_no_bit(tmp_path: Path) -> None:
    plain, guarded = trainer(tmp_path / "plain"), trainer(tmp_path / "guarded", guard=SKIP)
    spikes = trainer(tmp_path / "spikes", guard=GuardConfig(spike_factor=100.0))
    for ours in (plain, guarded, spikes):
        ours.fit(points)
    assert "guard.total" in guarded.state()
    assert not any(name.startswith("guard") for name in plain.state())
    for ours in (guarded, spikes):
        assert states_equal(without(ours.state(), "guard"), plain.state())
    assert lines(tmp_path / "spikes") == lines(tmp_path / "plain")
    assert [line | {"skipped_updates": 0.0} for line in lines(tmp_path / "plain")] == lines(tmp_path / "guarded")


def test_left_out_updates_are_counted_and_told(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as file:
        trainer(tmp_path / "run", guard=SKIP, console=Console(file=file)).fit(spoiled({3, 4, 9}))
        file.seek(0)
        said = [line for line in file.read().splitlines() if "left out" in line]
    assert [line["skipped_updates"] for line in lines(tmp_path / "run")][2:11] == [0, 1, 2, 2, 2, 2, 2, 3, 3]
    assert lines(tmp_path / "run")[3]["loss"] is None
    assert said == [
        "warning: step 4: 1 bad updates were left out; 1 so far",
        "warning: step 5: 1 bad updates were left out; 2 so far",
        "warning: step 10: 1 bad updates were left out; 3 so far",
    ]


def test_too_many_in_a_row_go_back_to_the_checkpoint_and_meet_other_samples(tmp_path: Path) -> None:
    """From a checkpoint at 5, samples 7 to 9 are bad: the run goes back to 5 and on with samples it never had."""
    asked: list[tuple[int, int]] = []
    stream = spoiled({7, 8, 9})

    def recorded(start: int, count: int) -> Iterator[Points]:
        asked.append((start, count))
        return stream(start, count)

    run = trainer(tmp_path / "run", guard=SKIP)
    run.fit(recorded)
    assert asked == [(0, 20), (ANOTHER_ORDER + 5, 15)]
    assert lines(tmp_path / "run")[5] == {"step": 6, "rollbacks": 1, "from_step": 10}
    by_hand = trainer(tmp_path / "by_hand", guard=SKIP)
    for step in range(20):
        by_hand.update(next(points(step + (ANOTHER_ORDER if step >= 5 else 0), 1)))
        by_hand.step += 1
    assert states_equal(without(run.state(), "guard"), without(by_hand.state(), "guard"))


@pytest.mark.parametrize("stops", [(4,), (5, 6), (8,), (9,), (10,), (5, 6, 16)])
def test_a_run_that_goes_back_is_exact_under_interruption(tmp_path: Path, stops: tuple[int, ...]) -> None:
    bad = {7, 8, 9, ANOTHER_ORDER + 6, ANOTHER_ORDER + 7, ANOTHER_ORDER + 8}
    whole = trainer(tmp_path / "whole", guard=SKIP)
    whole.fit(spoiled(bad))
    assert whole.guard.rollbacks == 2

    def interrupted(step: int, loss: Tensor) -> Tensor:
        if step in left:
            left.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    left = set(stops)
    for attempt in range(len(stops) + 1):
        ours = trainer(tmp_path / "run", Regression(before=interrupted), guard=SKIP, keep=1)
        if found := latest(tmp_path / "run"):
            ours.restore(found)
        with pytest.raises(Interrupted) if attempt < len(stops) else contextlib.nullcontext():
            ours.fit(spoiled(bad))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert states_equal(ours.state(), whole.state())


def test_after_a_few_rollbacks_the_run_stops(tmp_path: Path) -> None:
    bad = {step + shift * ANOTHER_ORDER for step in range(7, 20) for shift in range(4)}
    ours = trainer(tmp_path, guard=SKIP)
    message = (
        r"step 8: the loss or its gradient is not finite, 3 times in a row and after going back 2 times, on samples "
        rf"{(2 * ANOTHER_ORDER + 7) * BATCH} to {(2 * ANOTHER_ORDER + 10) * BATCH - 1}; .*step-00000005; lower optim.lr"
    )
    with pytest.raises(RunError, match=message):
        ours.fit(spoiled(bad))
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 5


def test_without_a_checkpoint_to_go_back_to_the_run_stops(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step 2: .*there is no checkpoint yet; lower optim.lr"):
        trainer(tmp_path, guard=SKIP).fit(spoiled({1, 2, 3}))


def test_nothing_is_saved_in_the_middle_of_bad_updates(tmp_path: Path) -> None:
    patient = GuardConfig(action="skip", max_bad_updates=10)
    trainer(tmp_path / "run", guard=patient, keep=9).fit(spoiled({8, 9, 10}))
    assert [path.name[-2:] for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["05", "15", "20"]


def test_a_spike_is_left_out_and_a_finite_norm_is_no_spike_without_the_guard(tmp_path: Path) -> None:
    spikes = GuardConfig(action="skip", spike_factor=10.0)
    guarded = trainer(tmp_path / "on", guard=spikes, steps=80)
    guarded.fit(spoiled({70}, how=1000.0))
    counts = [line["skipped_updates"] for line in lines(tmp_path / "on")]
    assert (counts[69], counts[70], counts[79]) == (0, 1, 1)
    off = trainer(tmp_path / "off", guard=GuardConfig(action="skip"), steps=80)
    off.fit(spoiled({70}, how=1000.0))
    assert lines(tmp_path / "off")[-1]["skipped_updates"] == 0
    assert not states_equal(off.state(), guarded.state())


def test_a_spike_stops_a_run_that_skips_nothing(tmp_path: Path) -> None:
    ours = trainer(tmp_path, guard=GuardConfig(spike_factor=10.0), steps=80)
    with pytest.raises(RunError, match=r"step 71: .*or more than 10 times as large as usual, on samples 560 to 567"):
        ours.fit(spoiled({70}, how=1000.0))


def test_the_mean_norm_is_that_of_the_good_updates(tmp_path: Path) -> None:
    ours = trainer(tmp_path, guard=GuardConfig(action="skip", spike_factor=1e6))
    ours.fit(spoiled({3}))
    norms = [line["grad_norm"] for line in lines(tmp_path) if line["grad_norm"] is not None]
    mean, count = ours.guard.state()["mean.grad_norm"].tolist()
    assert count == 19
    assert mean == pytest.approx(sum(norms) / 19, rel=1e-5)


def test_a_guard_may_be_turned_on_when_resuming(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="step 8"):
        trainer(tmp_path).fit(spoiled({7}))
    second = trainer(tmp_path, guard=SKIP)
    found = latest(tmp_path)
    assert found is not None
    second.restore(found)
    second.fit(spoiled({7}))
    assert lines(tmp_path)[-1]["skipped_updates"] == 1


@pytest.mark.parametrize(("field", "value"), [("spike_factor", 1.0), ("max_bad_updates", 0), ("max_rollbacks", -1)])
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} is {value}, expected"):
        GuardConfig(**{field: value})


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_out_of_memory_names_the_phase_and_what_to_lower(error: Exception, caught: bool) -> None:
    sentence = "step 8: out of memory in the backward pass of the critic; raise train.accumulate, or set loss.adv"
    with (
        pytest.raises(RunError if caught else type(error)) as found,
        enough_memory(7, lambda: "the backward pass of the critic"),
    ):
        raise error
    assert str(found.value).startswith(sentence) == caught


def test_every_phase_is_named(tmp_path: Path) -> None:
    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(context: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunError, match=r"step 1: out of memory in the backward pass of the model; raise train.acc"):
        trainer(tmp_path, Regression(before=lambda step, loss: Hungry.apply(loss))).fit(points)
    task = Regression()
    task.health = Regression.health.__get__(task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "health", lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(RunError, match="out of memory in the health figures"):
            trainer(tmp_path, task).fit(points)
