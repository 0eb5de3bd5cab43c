import dataclasses
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from softvq import ranks
from softvq.errors import InputError, Interrupted, RunError
from softvq.training import checkpoint, distributed
from softvq.training.checkpoint import latest
from softvq.training.optim import OptimConfig
from softvq.training.task import Task, split
from softvq.training.tracking import read_log
from softvq.training.train_config import TrainConfig
from softvq.training.trainer import Trainer
from tests.ranks import run_as_ranks

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Points:
    """A batch of inputs and what should come out."""

    inputs: Tensor
    targets: Tensor
    skipped: list[str] = dataclasses.field(default_factory=list)


def points(start: int, count: int, batch: int = BATCH, rank: int = 0, world_size: int = 1) -> Iterator[Points]:
    for step in range(start, start + count):
        inputs = torch.randn(batch, 6, generator=torch.Generator().manual_seed(step))
        part = slice(rank * batch // world_size, (rank + 1) * batch // world_size)
        yield Points(inputs[part], inputs[part].cumsum(1))


class Regression(Task):
    """A small network with dropout; `before` may do anything to a step's loss, and `calls` counts forward passes."""

    def __init__(self, dropout: float = 0.2, before: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 6))
        self.before = before or (lambda step, loss: loss)
        self.calls = 0

    def forward(self, batch: Points, step: int, scheduled: dict[str, float]) -> tuple[Tensor, dict[str, Tensor], None]:
        self.calls += 1
        outputs = self.model(batch.inputs)
        error = (outputs - batch.targets).square().mean()
        return self.before(step, error), {"error": error, "largest": outputs.abs().max()}, None


def trainer(run: Path, task: Task | None = None, console: Console | None = None, **changes: object) -> Trainer:
    settings = {"batch_size": BATCH, "steps": 20, "log_every": 1, "save_every": 5, "sample_every": 0, "device": "cpu"}
    run.mkdir(exist_ok=True)
    sample = changes.pop("sample", None)
    return Trainer(
        task or Regression(),
        run,
        TrainConfig(**{**settings, "ema_decay": 0.9, **changes}),
        OptimConfig(lr=1e-2, warmup_steps=2),
        seed=3,
        console=console or Console(quiet=True),
        sample=sample,
    )


def lines(run: Path) -> list[dict[str, object]]:
    return [
        {name: value for name, value in record.items() if name != "clock"} for record in read_log(run / "log.jsonl")
    ]


def states_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns(tmp_path: Path) -> None:
    trainer(tmp_path, Regression(dropout=0.0), steps=150).fit(points)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert len(losses) == 150
    assert sum(losses[-10:]) < sum(losses[:10]) / 4


def test_the_log_holds_every_number_of_a_step(tmp_path: Path) -> None:
    trainer(tmp_path, steps=6, log_every=4).fit(points)
    records = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records] == [4, 6]
    assert set(records[0]) == {"step", "loss", "error", "largest", "grad_norm", "lr", "clock"}
    assert records[0]["loss"] == records[0]["error"]
    assert set(records[0]["clock"]) == {"time", "images_per_sec"}


@pytest.mark.parametrize("stop", [1, 5, 7, 18])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, stop: int) -> None:
    whole = trainer(tmp_path / "whole")
    whole.fit(points)
    first = trainer(tmp_path / "run", Regression(before=lambda step, loss: stop_at(step, stop, loss)))
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {stop + 1}, saved at step {stop + 1}"):
        first.fit(points)
    second = trainer(tmp_path / "run")
    found = latest(tmp_path / "run")
    assert found is not None
    second.restore(found)
    assert second.step == stop + 1
    second.fit(points)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert states_equal(second.state(), whole.state())


def stop_at(step: int, stop: int, loss: Tensor) -> Tensor:
    if step == stop:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss


def test_stopping_is_saved_at_once_and_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(step: int, loss: Tensor) -> Tensor:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(Interrupted, match="SIGINT"):
        trainer(tmp_path, Regression(before=interrupt)).fit(points)
    assert [step.name for step in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000005", "step-00000007"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with distributed.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.name, codes) == ("SIGTERM", [])
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == [130]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_nothing(tmp_path: Path, accumulate: int) -> None:
    one, parts = Regression(dropout=0.0), Regression(dropout=0.0)
    trainer(tmp_path / "one", one).fit(points)
    trainer(tmp_path / "parts", parts, accumulate=accumulate).fit(points)
    assert parts.calls == accumulate * one.calls
    for ours, whole in zip(lines(tmp_path / "parts"), lines(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    for ours, whole in zip(parts.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)


def test_a_batch_is_split_in_equal_parts() -> None:
    parts = split(Points(torch.arange(6), torch.arange(6) * 2, ["a"]), 3, torch.device("cpu"))
    assert [part.inputs.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part.targets.tolist() for part in parts] == [[0, 2], [4, 6], [8, 10]]
    assert all(part.skipped == ["a"] for part in parts)


def nan_at(bad: int, how: str) -> Callable[[int, Tensor], Tensor]:
    def spoil(step: int, loss: Tensor) -> Tensor:
        if step != bad:
            return loss
        if how == "gradient":  # of a finite loss
            return loss + (torch.sqrt(loss - loss.detach()) if loss.requires_grad else 0)
        return loss * (math.inf if how == "inf" else math.nan)

    return spoil


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_update(tmp_path: Path, how: str) -> None:
    good = trainer(tmp_path / "good", steps=20)
    good_stream = points(0, 7)
    for _ in range(7):
        good.update(next(good_stream))
        good.step += 1
    bad = trainer(tmp_path / "bad", Regression(before=nan_at(7, how)))
    message = (
        r"step 8: the loss or its gradient is not finite, on samples 56 to 63; "
        r"no weight was changed by it and the last good checkpoint is .*step-00000005"
    )
    with pytest.raises(RunError, match=message):
        bad.fit(points)
    for name in ("model", "optimizer"):
        ours = {key: value for key, value in bad.state().items() if key.startswith(name)}
        assert states_equal(ours, {key: value for key, value in good.state().items() if key.startswith(name)})
    assert [line["step"] for line in lines(tmp_path / "bad")] == list(range(1, 8))


def test_weights_stay_good_even_if_nobody_looks_for_many_steps(tmp_path: Path) -> None:
    """On a GPU the host looks only at log steps: until then every later update has to be left out as well."""
    spoiled = trainer(tmp_path, Regression(before=nan_at(3, "nan")))
    states = []
    for batch in points(0, 10):
        spoiled.update(batch)
        spoiled.step += 1
        states.append({name: value.clone() for name, value in spoiled.task.state_dict().items()})
    assert not states_equal(states[1], states[2])
    assert all(states_equal(states[2], state) for state in states[3:])
    with pytest.raises(RunError, match=r"step 4: .* samples 24 to 31; .* there is no checkpoint yet"):
        spoiled.check_finite()


def test_nothing_is_saved_after_an_update_that_was_not_finite(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.step, ours.guard._failed = 5, torch.tensor(3)
    with pytest.raises(RunError, match="step 4: the loss or its gradient is not finite"):
        ours.save()
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def crowded(run: Path, step: int, *rest: object) -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500 if step in (10, 15) else soft, hard))
        try:
            return original(run, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint, "save", crowded)
    with (tmp_path / "out").open("w+") as file:
        trainer(tmp_path / "run", console=Console(file=file)).fit(points)
        file.seek(0)
        warnings = [line for line in file.read().splitlines() if line.startswith("warning")]
    assert ["step-00000010" in warnings[0], "step-00000015" in warnings[1], len(warnings)] == [True, True, 2]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000005", "step-00000020"]
    monkeypatch.setattr(checkpoint, "save", original)
    trainer(tmp_path / "calm").fit(points)
    assert lines(tmp_path / "run") == lines(tmp_path / "calm")


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    ours = trainer(tmp_path, steps=6)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunError, match="step-00000006: the checkpoint cannot be written"):
        ours.fit(points)


def test_samples_see_averaged_weights_in_evaluation_mode(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def sample(step: int) -> dict[str, float]:
        averages = ours.averages.main.state()
        assert states_equal(dict(ours.task.model.named_parameters()), averages)
        assert not torch.is_grad_enabled()
        seen.append((step, ours.task.training))
        if step == 20:
            raise RunError("no room for the picture")
        return {"psnr": 1.5}

    ours = trainer(tmp_path, sample=sample, sample_every=10, log_every=20)
    ours.fit(points)
    assert seen == [(10, False), (20, False)]
    assert ours.task.training
    assert lines(tmp_path)[0] == {"step": 10, "samples": {"psnr": 1.5}}
    plain = trainer(tmp_path / "plain", log_every=20)
    plain.fit(points)
    assert states_equal(plain.state(), ours.state())


def test_images_passed_over_are_named_in_the_log(tmp_path: Path) -> None:
    def stream(start: int, count: int) -> Iterator[Points]:
        for step, batch in enumerate(points(start, count), start):
            yield dataclasses.replace(batch, skipped=["bad.jpg"] if step == 2 else [])

    trainer(tmp_path, log_every=20).fit(stream)
    assert lines(tmp_path)[0] == {"step": 3, "skipped": ["bad.jpg"]}


def test_out_of_memory_is_one_sentence(tmp_path: Path) -> None:
    def exhaust(step: int, loss: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        RunError, match=r"step 1: out of memory in the forward pass of the model; raise train.accumulate"
    ):
        trainer(tmp_path, Regression(before=exhaust)).fit(points)


def test_bf16_keeps_weights_and_state_in_float32(tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []
    task = Regression(dropout=0.0)
    task.model[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    low = trainer(tmp_path / "low", task, precision="bf16")
    low.fit(points)
    assert set(dtypes) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in low.state().values())
    trainer(tmp_path / "full", Regression(dropout=0.0)).fit(points)
    for ours, full in zip(lines(tmp_path / "low"), lines(tmp_path / "full"), strict=True):
        assert ours["loss"] == pytest.approx(full["loss"], rel=2e-2)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    run_as_ranks(train_as_rank, tmp_path / "two")
    trainer(tmp_path / "one", Regression(dropout=0.0), accumulate=2).fit(points)
    ours, one = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert len(ours) == 20
    for line, whole in zip(ours, one, strict=True):
        assert line["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def train_as_rank(run: Path) -> None:
    distributed.join(torch.device("cpu"))
    try:
        ours = trainer(run, Regression(dropout=0.0), accumulate=2)
        rank, world_size = ranks.rank(), ranks.world_size()
        ours.fit(lambda start, count: points(start, count, BATCH, rank, world_size))
        weights = {name: value.tolist() for name, value in ours.task.state_dict().items()}
        (run / f"rank-{rank}.json").write_text(json.dumps(weights))
        distributed.wait_for_all()
    finally:
        distributed.leave()


def test_one_process_is_a_world_of_its_own() -> None:
    assert (ranks.rank(), ranks.world_size(), ranks.is_main()) == (0, 1, True)
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.reduce_mean({"a": torch.tensor(1.5), "b": torch.tensor(0.1)}) == {
        "a": 1.5,
        "b": torch.tensor(0.1).item(),
    }
    assert distributed.reduce_mean({}) == {}


@pytest.mark.parametrize("name", ["graphics", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="device is"):
        distributed.choose_device(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("steps", 0), ("accumulate", 3), ("ema_decay", 1.0), ("sample_every", -1), ("keep", 0)],
)
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field} is {value}, expected"):
        TrainConfig(**{field: value})


@pytest.mark.gpu
def test_on_a_gpu_the_guard_holds_and_resuming_is_exact(tmp_path: Path) -> None:
    settings = {"device": "cuda", "precision": "bf16", "log_every": 10, "save_every": 10}
    spoiled = trainer(tmp_path / "bad", Regression(before=nan_at(13, "nan")), **settings)
    with pytest.raises(RunError, match=r"step 14: .*step-00000010"):
        spoiled.fit(points)
    assert all(value.isfinite().all() for value in spoiled.state().values())
    found = latest(tmp_path / "bad")
    assert found is not None
    resumed, whole = trainer(tmp_path / "bad", **settings), trainer(tmp_path / "whole", **settings)
    resumed.restore(found)
    resumed.fit(points)
    whole.fit(points)
    assert states_equal(resumed.state(), whole.state())
