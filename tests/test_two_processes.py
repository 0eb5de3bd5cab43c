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

pytestmark = pytest.mark.slow
CASES = {name: (quantizer, False) for name, quantizer in family.QUANTIZERS.items()}
FLAGGED = ("softvq", "kl", "gumbel", "residual-product")
CASES |= {f"{name}-every-flag": (family.QUANTIZERS[name], True) for name in FLAGGED}
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
