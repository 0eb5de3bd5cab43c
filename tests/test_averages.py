import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from softvq.config import from_dict
from softvq.errors import InputError, RunError
from softvq.files import read_tensors, write_tensors
from softvq.training import checkpoint
from softvq.training.averages import (
    Averages,
    Ema,
    ema_decay_at,
    find_snapshots,
    post_hoc_average,
    post_hoc_shares,
    power_decay_at,
    power_exponent,
    save_snapshot,
    snapshot_profiles,
)
from softvq.training.optim import OptimConfig
from softvq.training.task import Task
from softvq.training.train_config import TrainConfig
from softvq.training.trainer import Trainer
from tests.program import contents

LENGTHS = (0.05, 0.1)


class Network(nn.Module):
    """Something that is trained, and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.codebook = nn.Parameter(torch.randn(2, 8, 4))
        self.teacher = nn.Linear(4, 4).requires_grad_(False)


class Walk(nn.Module):
    """A weight that is told where to be."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    @torch.no_grad()
    def go(self, place: Tensor) -> None:
        self.weight.copy_(place)


def random_walk(steps: int, dim: int = 16) -> Tensor:
    """Return where a weight is after 1, 2, ... updates."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, dim, generator=generator).cumsum(0) / math.sqrt(steps)


def profile(length: float, steps: int) -> Tensor:
    """Return how much each step counts: the integral of s^gamma over its interval."""
    edges = torch.arange(steps + 1).double() / steps
    return (edges ** (power_exponent(length) + 1)).diff()


@dataclasses.dataclass(frozen=True)
class Points:
    inputs: Tensor


def points(start: int, count: int) -> Iterator[Points]:
    for step in range(start, start + count):
        yield Points(torch.randn(4, 6, generator=torch.Generator().manual_seed(step)))


class Regression(Task):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"tokenizer": nn.Linear(6, 3)})

    def forward(self, batch: Points, step: int, scheduled: dict[str, float]) -> tuple[Tensor, dict[str, Tensor], None]:
        outputs = self.model["tokenizer"](batch.inputs)
        return (outputs - batch.inputs[:, :3].cumsum(1)).square().mean(), {}, None


def trainer(run: Path, console: Console | None = None, **changes: object) -> Trainer:
    run.mkdir(exist_ok=True)
    settings = {"batch_size": 4, "steps": 20, "log_every": 20, "save_every": 5, "sample_every": 0, "device": "cpu"}
    config = TrainConfig(**{**settings, "ema_decay": 0.9, **changes})
    console = console or Console(quiet=True)
    return Trainer(Regression(), run, config, OptimConfig(lr=1e-2), seed=3, console=console)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_ema_decay_is_ramped_up() -> None:
    assert ema_decay_at(0.999, 0) == 0.1
    assert ema_decay_at(0.999, 8) == 0.5
    assert ema_decay_at(0.999, 1_000_000) == 0.999


def test_ema_is_the_weighted_mean_and_leaves_frozen_weights_out() -> None:
    network = Network()
    ema = Ema(network, 0.3)
    assert not any(name.startswith("teacher") for name in ema.averages)
    expected = network.linear.weight.detach().double()
    for step in range(1, 5):
        with torch.no_grad():
            network.linear.weight.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(step)))
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.linear.weight.detach().double()
        ema.update(step)
    torch.testing.assert_close(ema.averages["linear.weight"], expected.float())


def test_ema_with_decay_zero_is_a_copy() -> None:
    network = Network()
    ema = Ema(network, 0.0)
    with torch.no_grad():
        network.codebook.normal_()
    ema.update(1)
    torch.testing.assert_close(ema.averages["codebook"], network.codebook.detach())


def test_lent_averages_are_taken_back_bit_for_bit_even_after_an_error() -> None:
    network = Network()
    ema = Ema(network, 0.9)
    with torch.no_grad():
        network.codebook.add_(1.0)
    own = network.codebook.detach().clone()
    with ema.in_place():
        assert torch.equal(network.codebook, ema.averages["codebook"])
        assert not torch.equal(network.codebook, own)
    assert torch.equal(network.codebook, own)
    with pytest.raises(KeyError), ema.in_place():
        raise KeyError
    assert torch.equal(network.codebook, own)


@pytest.mark.parametrize("length", [0.001, 0.01, 0.05, 0.1, 0.25, 0.288])
def test_the_exponent_has_its_length(length: float) -> None:
    gamma = power_exponent(length)
    assert gamma >= 0
    assert math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3) == pytest.approx(length, rel=1e-12)


def test_the_length_is_the_deviation_of_the_profile() -> None:
    weights, places = profile(0.1, 20_000), (torch.arange(20_000).double() + 0.5) / 20_000
    mean = (weights * places).sum()
    assert float((weights * (places - mean) ** 2).sum().sqrt()) == pytest.approx(0.1, rel=1e-4)
    assert power_exponent(0.1) == pytest.approx(6.94, abs=0.01)  # as the paper rounds it
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.01)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.28])
def test_a_power_function_average_is_the_sum_with_its_profile(length: float) -> None:
    walk = random_walk(200)
    module = Walk(torch.full((16,), 1e4))  # where it began counts nothing
    averages = Averages(module, 0.9, (), (length,))
    for step, place in enumerate(walk, 1):
        module.go(place)
        averages.update(step)
    found = averages.named(f"power_{length}").state()["weight"]
    torch.testing.assert_close(found, (profile(length, 200) @ walk.double()).float(), rtol=1e-4, atol=1e-5)
    assert power_decay_at(power_exponent(length), 1) == 0


def test_weights_that_do_not_move_are_their_own_averages() -> None:
    module = Network()
    averages = Averages(module, 0.9, (0.5,), LENGTHS)
    for step in range(1, 50):
        averages.update(step)
    for average in (averages.main, *averages.others.values()):
        torch.testing.assert_close(average.state()["codebook"], module.codebook.detach(), rtol=1e-6, atol=1e-6)


def test_several_averages_are_what_each_is_alone() -> None:
    module = Network()
    together = Averages(module, 0.9, (0.5, 0.99), LENGTHS)
    alone = {
        "ema": Ema(module, 0.9),
        "ema_0.5": Ema(module, 0.5),
        "ema_0.99": Ema(module, 0.99),
        **{f"power_{x}": Ema(module, lambda step, x=x: power_decay_at(power_exponent(x), step)) for x in LENGTHS},
    }
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 20):
        with torch.no_grad():
            module.codebook.normal_(generator=generator)
        together.update(step)
        for average in alone.values():
            average.update(step)
    assert ["ema", *together.others] == list(alone)
    assert all(equal(together.named(name).state(), average.state()) for name, average in alone.items())
    assert together.named() is together.main
    with pytest.raises(InputError, match=r"average is 'ema_0.7', expected one of ema, ema_0.5, ema_0.99, power_0.05"):
        together.named("ema_0.7")


def snapshots_of(walk: Tensor, run: Path, every: int, lengths: tuple[float, ...] = LENGTHS) -> list[Path]:
    module = Walk(walk[0])
    module.register_parameter("still", nn.Parameter(torch.tensor([3.0, -2.0])))
    averages = Averages(module, 0.9, (), lengths)
    for step, place in enumerate(walk, 1):
        module.go(place)
        averages.update(step)
        if step % every == 0:
            averages.save_snapshot(run, step)
    return find_snapshots(run)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_post_hoc_average_of_a_kept_length_is_the_kept_one(tmp_path: Path, length: float) -> None:
    snapshots = snapshots_of(random_walk(400), tmp_path, every=40)
    assert len(snapshots) == 10
    kept, _ = read_tensors(snapshots[-1])
    found = post_hoc_average(snapshots, length)
    assert found.keys() == {"weight", "still"}
    torch.testing.assert_close(found["weight"], kept[f"power_{length}.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [0.04, 0.075, 0.13, 0.2])
def test_the_post_hoc_average_is_near_the_true_one(tmp_path: Path, length: float) -> None:
    """With 40 files the profiles are met to about 1 %, and so is the average, against how far the weight went."""
    walk = random_walk(1000)
    snapshots = snapshots_of(walk, tmp_path, every=25)
    _, distance = post_hoc_shares(snapshot_profiles(snapshots), 1000, length)
    assert distance < 0.015
    found = post_hoc_average(snapshots, length)
    true = (profile(length, 1000) @ walk.double()).float()
    assert (found["weight"] - true).norm() < 0.01 * walk.std(0).norm()
    other = (profile(1.5 * length if length < 0.15 else length / 1.5, 1000) @ walk.double()).float()
    assert (other - true).norm() > 5 * (found["weight"] - true).norm()  # so that the bound above tells lengths apart
    torch.testing.assert_close(found["still"], torch.tensor([3.0, -2.0]), rtol=1e-6, atol=1e-6)


def test_the_shares_are_the_least_squares_on_a_fine_grid() -> None:
    """Against the same fit with profiles as vectors, the condition put in by elimination."""
    kept = [(step, length) for step in (300, 600, 1000) for length in LENGTHS]
    count = 40_000
    columns = []
    for end, length in [*kept, (1000, 0.07)]:
        edges = (torch.arange(count + 1).double() / count * 1000 / end).clamp(max=1)
        columns.append((edges ** (power_exponent(length) + 1)).diff() * count)
    basis, wanted = torch.stack(columns[:-1], 1), columns[-1]
    free = torch.linalg.lstsq(basis[:, 1:] - basis[:, :1], (wanted - basis[:, 0])[:, None]).solution[:, 0]
    expected = torch.cat([1 - free.sum(0, keepdim=True), free])
    shares, distance = post_hoc_shares(kept, 1000, 0.07)
    torch.testing.assert_close(shares, expected, rtol=1e-3, atol=1e-4)
    assert distance == pytest.approx(float((basis @ expected - wanted).norm() / wanted.norm()), rel=1e-3)
    assert float(shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize("settings", [{"more_ema_decays": (0.5, 0.99)}, {"ema_lengths": LENGTHS}])
def test_more_averages_change_nothing_else(tmp_path: Path, settings: dict[str, object]) -> None:
    plain, more = trainer(tmp_path / "plain"), trainer(tmp_path / "more", **settings)
    plain.fit(points)
    more.fit(points)
    others = {name: value for name, value in more.state().items() if name.startswith("averages.")}
    assert len(others) == 4
    assert equal(plain.state(), {name: value for name, value in more.state().items() if name not in others})
    assert not (tmp_path / "plain/averages").exists()


@pytest.mark.parametrize("stop", [3, 5, 7, 15])
def test_a_resumed_run_has_the_same_averages_and_files(tmp_path: Path, stop: int) -> None:
    settings = {"more_ema_decays": (0.5,), "ema_lengths": LENGTHS}
    whole = trainer(tmp_path / "whole", **settings)
    whole.fit(points)
    first = trainer(tmp_path / "parts", **settings)
    stream = points(0, stop)
    for batch in stream:
        first.update(batch)
        first.step += 1
        if first.step % 5 == 0:
            first.save()
    first.save()  # as when it is interrupted
    first.update(next(points(stop, 1)))
    first.averages.save_snapshot(tmp_path / "parts", stop // 5 * 5 + 5)  # newer than the checkpoint, and wrong
    (tmp_path / "parts/averages/.step-00000010.safetensors.ab12.tmp.safetensors").touch()  # left by a kill
    second = trainer(tmp_path / "parts", **settings)
    found = checkpoint.latest(tmp_path / "parts")
    assert found is not None
    assert found.step == stop
    second.restore(found)
    second.fit(points)
    assert equal(second.state(), whole.state())
    names = [f"step-{step:08d}.safetensors" for step in (5, 10, 15, 20)]
    assert sorted(path.name for path in (tmp_path / "whole/averages").iterdir()) == names
    assert contents(tmp_path / "parts/averages") == contents(tmp_path / "whole/averages")


def test_averages_are_lent_by_name(tmp_path: Path) -> None:
    ours = trainer(tmp_path, more_ema_decays=(0.5,), ema_lengths=(0.1,))
    ours.fit(points)
    own = {name: p.detach().clone() for name, p in ours.task.model.named_parameters()}
    seen = []
    for name in (None, "ema_0.5", "power_0.1"):
        with ours.averaged(name):
            assert not ours.task.training
            assert not torch.is_grad_enabled()
            lent = {name: p.detach().clone() for name, p in ours.task.model.named_parameters()}
        assert equal(lent, ours.averages.named(name).state())
        seen.append(lent["tokenizer.weight"])
    assert len({tuple(weight.flatten().tolist()) for weight in seen}) == 3
    assert ours.task.training
    assert equal(own, dict(ours.task.model.named_parameters()))
    with pytest.raises(KeyError), ours.averaged("power_0.1"):
        raise KeyError
    assert ours.task.training
    assert equal(own, dict(ours.task.model.named_parameters()))


def test_a_checkpoint_with_other_averages_is_refused(tmp_path: Path) -> None:
    ours = trainer(tmp_path, ema_lengths=(0.1,), steps=5)
    ours.fit(points)
    assert ours.saved is not None
    with pytest.raises(RunError, match="average state does not fit this model"):
        trainer(tmp_path, ema_lengths=(0.05,)).restore(ours.saved)


def test_files_that_cannot_be_written_do_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "averages").write_text("in the way")
    with (tmp_path / "out").open("w+") as file, pytest.raises(RunError, match="averages"):
        trainer(tmp_path, console=Console(file=file, width=500), ema_lengths=(0.1,)).fit(points)
    warnings = (tmp_path / "out").read_text()
    assert warnings.count("warning: ") == 3  # and at the last step it is an error
    assert "step-00000005.safetensors: cannot be written" in warnings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ema_decay", 1.0, "ema_decay is 1.0, expected at least 0 and below 1"),
        ("more_ema_decays", (0.9, 1.5), "more_ema_decays is 1.5, expected at least 0 and below 1"),
        ("more_ema_decays", (0.5, 0.5), r"more_ema_decays is \[0.5, 0.5\], expected each average once"),
        ("more_ema_decays", (0.9999,), "more_ema_decays is .* expected each average once"),
        ("ema_lengths", (0.1, 0.3), "ema_lengths is 0.3, expected 0.001 to 0.288"),
        ("ema_lengths", (0.0,), "ema_lengths is 0.0, expected"),
        ("ema_lengths", (0.1, 0.1), "ema_lengths is .* expected each average once"),
        ("ema_lengths", (math.nan,), "ema_lengths is nan, expected"),
    ],
)
def test_config_refuses(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**{field: value})


def test_a_recipe_may_name_averages() -> None:
    config = from_dict(TrainConfig, {"more_ema_decays": [0.99], "ema_lengths": [0.05, 0.1]})
    assert (config.more_ema_decays, config.ema_lengths) == ((0.99,), LENGTHS)


def test_files_of_other_runs_are_refused(tmp_path: Path) -> None:
    snapshots = snapshots_of(random_walk(40), tmp_path, every=10)
    with pytest.raises(InputError, match="snapshots is empty"):
        post_hoc_average([], 0.1)
    with pytest.raises(InputError, match=r"length is 0\.3, expected"):
        post_hoc_average(snapshots, 0.3)
    save_snapshot(tmp_path, 20, {0.1: {"weight": torch.zeros(16)}})
    with pytest.raises(InputError, match=r"step-00000020.safetensors: holds other averages than step-00000010"):
        post_hoc_average(snapshots, 0.1)
    snapshots[3].replace(snapshots[1])
    with pytest.raises(InputError, match=r"step-00000020.safetensors: does not hold averages of the step in its name"):
        post_hoc_average(snapshots[:3], 0.1)
    snapshots[1].write_bytes(snapshots[0].read_bytes()[:-1])
    with pytest.raises(InputError, match=r"step-00000020.safetensors: not a whole safetensors file"):
        post_hoc_average(snapshots[:3], 0.1)
    for header in ("[]", "{", '{"version": 1, "step": 20}', '{"version": 1, "step": 20, "lengths": ["a"]}'):
        write_tensors(snapshots[1], {"weight": torch.zeros(1)}, {"softvq-averages": header})
        with pytest.raises(InputError, match=r"step-00000020.safetensors: does not hold averages of the step"):
            post_hoc_average(snapshots[:3], 0.1)
    header = '{"version": 1, "step": 20, "lengths": [0.1]}'
    write_tensors(snapshots[1], {"weight": torch.zeros(1)}, {"softvq-averages": header})
    with pytest.raises(InputError, match=r"step-00000020.safetensors: holds tensors that are not of its averages"):
        post_hoc_average(snapshots[:3], 0.1)
    with pytest.raises(InputError, match="is no file of kept averages"):
        post_hoc_average([tmp_path / "averages" / "other.safetensors"], 0.1)


@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_a_share_of_one_takes_exactly_the_weights_unless_it_is_to_be_skipped(skip: float | None) -> None:
    torch.manual_seed(0)
    module = nn.Linear(7, 5)
    average = Ema(module, lambda step: 0.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 1e-5)
    before = {name: value.clone() for name, value in average.averages.items()}
    average.update(1, None if skip is None else torch.tensor(skip))
    expected = before if skip else dict(module.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in average.averages.items())
