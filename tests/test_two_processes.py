"""Two processes with half of every batch learn what one learns with the whole: every quantizer, every loss."""

import json
from pathlib import Path

import pytest
import torch

from softvq import ranks
from softvq.training import distributed
from softvq.training.tracking import read_log
from tests import family
from tests.ranks import run_as_ranks
from tests.reliability.exact import compute_in_float64

pytestmark = pytest.mark.slow
CASES = {name: (quantizer, False) for name, quantizer in family.QUANTIZERS.items()}
FLAGGED = ("softvq", "kl", "gumbel", "residual-product")
CASES |= {f"{name}-every-flag": (family.QUANTIZERS[name], True) for name in FLAGGED}
EXACT = [name for name in CASES if name.endswith("-every-flag")]
HEALTH = {"usage", "perplexity", "posterior_entropy", "max_probability"}


def train(name: str, folder: Path) -> None:
    quantizer, every_flag = CASES[name]
    config = family.recipe(quantizer, every_flag=every_flag, steps=4)
    rank, count = ranks.rank(), ranks.world_size()
    trainer = family.trainer(config, folder / name)
    trainer.fit(lambda start, steps: family.stream(config, start, steps, rank, count))


def train_as_rank(folder: Path) -> None:
    distributed.join(torch.device("cpu"))
    try:
        for name in CASES:
            train(name, folder)
    finally:
        distributed.leave()


def train_exactly_as_rank(folder: Path) -> None:
    compute_in_float64()
    distributed.join(torch.device("cpu"))
    try:
        for name in EXACT:
            train(name, folder)
    finally:
        distributed.leave()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every case in two processes, one case after the other."""
    folder = tmp_path_factory.mktemp("two")
    run_as_ranks(train_as_rank, folder)
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_learn_what_one_does(name: str, by_two: Path, tmp_path: Path) -> None:
    train(name, tmp_path)
    two, one = read_log(by_two / name / "log.jsonl"), read_log(tmp_path / name / "log.jsonl")
    assert len(two) == len(one) == 4
    for ours, whole in zip(two, one, strict=True):
        assert ours.keys() == whole.keys()
        for key in sorted(ours.keys() - {"clock"}):
            tolerance = 1e-5 if key not in {"grad_norm", "critic_grad_norm"} else 1e-3
            assert ours[key] == pytest.approx(whole[key], rel=tolerance, abs=1e-6), (key, whole["step"])
    health = HEALTH & one[0].keys()
    assert health == (set() if name.startswith(("kl", "none")) else HEALTH), json.dumps(one[0])


@pytest.fixture(scope="module")
def exactly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with everything on in float64, in one process and in two."""
    root = tmp_path_factory.mktemp("exactly")
    for count in (1, 2):
        run_as_ranks(train_exactly_as_rank, root / str(count), count=count)
    return root


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_differ_from_one_by_no_more_than_rounding(name: str, exactly: Path) -> None:
    one, two = (read_log(exactly / count / name / "log.jsonl") for count in ("1", "2"))
    assert len(one) == len(two) == 4
    for ours, whole in zip(two, one, strict=True):
        for key in sorted(ours.keys() - {"clock"}):
            assert ours[key] == pytest.approx(whole[key], rel=1e-9, abs=1e-12), (key, whole["step"])
