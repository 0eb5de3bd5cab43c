"""Sharded over two or four processes, copied to four, or alone: the same training, and checkpoints that all take."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from softvq import ranks
from softvq.files import read_tensors
from softvq.pipeline import GenerationPipeline
from softvq.training import distributed
from softvq.training.checkpoint import Checkpoint
from softvq.training.generator_run import train_generator
from softvq.training.tokenizer_recipe import TokenizerRunConfig
from softvq.training.tracking import read_log
from softvq.training.trainer import Trainer
from tests import family
from tests.generators import STEPS, make_cache, run_config
from tests.ranks import run_as_ranks

pytestmark = pytest.mark.slow
TOKENIZER: dict[str, dict[str, Any]] = {
    "gan": {"every_flag": True, "ema_lengths": [0.1]},
    "muon": {"accumulate": 2, "activation_checkpointing": True},
}
GENERATOR = {
    "sit": {"optim__kind": "muon"},
    "mar": {"train__activation_checkpointing": True, "train__ema_lengths": [0.1]},
}
HOW = {1: ("none",), 2: ("fsdp",), 4: ("fsdp", "none")}
HALF = "fsdp-2/gan/checkpoints/step-00000002"
OTHERS = ("fsdp-2", "fsdp-4", "none-4")
COPIED = {"gan", "sit"}
"""What is trained by four processes with a copy each, too."""


def tokenizer_config(case: str, shard: str) -> TokenizerRunConfig:
    quantizer = family.QUANTIZERS["kl" if case == "muon" else "softvq"]  # kl has no term that a part of a batch changes
    config = family.recipe(quantizer, **{"save_every": 2, "steps": 4, "keep": 9, "shard": shard, **TOKENIZER[case]})
    if case == "muon":  # and every gradient is longer than may be
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, kind="muon", grad_clip=0.05))
    return config


def train_tokenizer(case: str, folder: Path, shard: str, saved: Path | None = None) -> Trainer:
    config = tokenizer_config(case, shard)
    trainer = family.trainer(config, folder)
    if saved is not None:
        trainer.restore(Checkpoint(folder=saved, step=2))
    trainer.fit(lambda start, steps: family.stream(config, start, steps, ranks.rank(), ranks.world_size()))
    return trainer


def generator_config(case: str, root: Path, shard: str) -> Any:
    every = {"train__sample_every": 3, "train__keep": 9}
    return run_config(case, latents=root / "cache", train__shard=shard, **every, **GENERATOR[case])


def cases(every: Mapping[str, Any], shard: str, count: int) -> list[str]:
    return [case for case in every if shard == "fsdp" or count == 1 or case in COPIED]


def train_as_rank(root: Path) -> None:
    """Train everything as one of the processes, then go on from the middle of what two of them did."""
    ports = iter(os.environ["PORTS"].split())
    os.environ["MASTER_PORT"] = next(ports)
    distributed.join(torch.device("cpu"))
    count = ranks.world_size()
    for shard in HOW[count]:
        folder = root / f"{shard}-{count}"
        for case in cases(TOKENIZER, shard, count):
            trainer = train_tokenizer(case, folder / case, shard)
            if shard == "fsdp":
                look_at_weights(trainer, folder / case)
    if count == 4:
        train_tokenizer("gan", root / "resumed-4" / "gan", "fsdp", root / HALF)
    distributed.leave()
    for shard in HOW[count]:
        for case in cases(GENERATOR, shard, count):
            os.environ["MASTER_PORT"] = next(ports)
            train_generator(generator_config(case, root, shard), root / f"{shard}-{count}" / case)
    if count == 4:
        os.environ["MASTER_PORT"] = next(ports)
        resume_generator("sit", root, "fsdp", "resumed-4")


def resume_generator(case: str, root: Path, shard: str, name: str) -> Path:
    run = root / name / case
    if os.environ.get("RANK", "0") == "0":
        copy = run.with_name("copy")
        shutil.copytree(root / "fsdp-2" / case, copy)
        shutil.rmtree(copy / f"checkpoints/step-{STEPS:08d}")
        shutil.rmtree(copy / "generator")
        copy.rename(run)
    while not run.exists():
        time.sleep(0.05)
    train_generator(generator_config(case, root, shard), run, resume=True)
    return run


def look_at_weights(trainer: Trainer, folder: Path) -> None:
    """Write down how the weights are spread, and whether the first rank can borrow them whole."""
    weights = dict(trainer.task.model.named_parameters())
    spread = {name for name, weight in weights.items() if isinstance(weight, DTensor)}
    facts = {
        "spread": sorted(spread),
        "matrices": sorted(name for name, weight in weights.items() if weight.ndim > 1),
        "elements": sum(trainer.optimizer._parts[name].numel() for name in spread),
        "all": sum(weights[name].numel() for name in spread),
    }
    averages = {name: value.clone() for name, value in trainer.averages.main.averages.items()}
    with trainer.averaged():
        if ranks.is_main():
            lent = {name: value.detach() for name, value in trainer.task.model.named_parameters()}
            facts["plain"] = not any(isinstance(value, DTensor) for value in lent.values())
            tokenizer = trainer.task.tokenizer
            images = tokenizer.decode_raw(tokenizer.encode_raw(family.pictures(family.recipe(family.SOFT), 9).images))
            facts["images"] = images.mean(dim=(1, 2, 3)).tolist()
    assert all(torch.equal(value, trainer.averages.main.averages[name]) for name, value in averages.items())
    if ranks.is_main():
        (folder / "facts.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train everything in one, two and four processes."""
    root = tmp_path_factory.mktemp("sharding")
    make_cache(root)
    for count in HOW:
        run_as_ranks(train_as_rank, root, count=count, meetings=6)
    return root


def compare(ours: Path, theirs: Path, steps: int, loss: float = 1e-5) -> None:
    """Compare logs line by line, and what is in the last checkpoints."""
    one, other = ([r for r in read_log(run / "log.jsonl") if "loss" in r] for run in (ours, theirs))
    assert [line["step"] for line in one] == [line["step"] for line in other][-len(one) :]
    assert one[-1]["step"] == steps
    for mine, whole in zip(one, other[-len(one) :], strict=True):
        assert mine.keys() == whole.keys()
        for key in mine.keys() - {"clock"}:
            tolerance = 1e-3 if key.endswith("grad_norm") else loss
            assert mine[key] == pytest.approx(whole[key], rel=tolerance, abs=1e-6), (key, mine["step"])
    states = [read_tensors(run / f"checkpoints/step-{steps:08d}/state.safetensors")[0] for run in (ours, theirs)]
    assert {name: x.shape for name, x in states[0].items()} == {name: x.shape for name, x in states[1].items()}
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("case", "how"), [(c, how) for how in OTHERS for c in cases(TOKENIZER, how[:4], int(how[-1]))])
def test_a_tokenizer_learns_the_same_in_parts(case: str, how: str, root: Path) -> None:
    compare(root / how / case, root / "none-1" / case, 4)


@pytest.mark.parametrize(("case", "how"), [(c, how) for how in OTHERS for c in cases(GENERATOR, how[:4], int(how[-1]))])
def test_a_generator_learns_the_same_in_parts(case: str, how: str, root: Path) -> None:
    compare(root / how / case, root / "none-1" / case, STEPS)
    mine, whole = (GenerationPipeline.from_pretrained(root / name / case / "generator") for name in (how, "none-1"))
    for name, value in mine.generator.state_dict().items():
        torch.testing.assert_close(value, whole.generator.state_dict()[name], rtol=1e-2, atol=1e-4)
    samples = [(root / name / case / "samples/step-00000003.png").exists() for name in (how, "none-1")]
    assert samples == [True, True]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", list(TOKENIZER))
def test_each_process_holds_its_part_and_the_first_can_borrow_all(case: str, count: int, root: Path) -> None:
    facts, other = (json.loads((root / f"fsdp-{n}" / case / "facts.json").read_text()) for n in (count, 6 - count))
    assert facts["spread"] == facts["matrices"]
    assert facts["elements"] < 1.6 * facts["all"] / count  # one row cannot be divided, and stays with the first
    assert facts["plain"]
    assert facts["images"] == pytest.approx(other["images"], rel=1e-4, abs=1e-5)


def test_two_sharded_processes_are_gone_on_with_by_four_and_by_one(root: Path) -> None:
    compare(root / "resumed-4" / "gan", root / "none-1" / "gan", 4)
    train_tokenizer("gan", root / "resumed-1" / "gan", "none", root / HALF)
    compare(root / "resumed-1" / "gan", root / "none-1" / "gan", 4)
    compare(root / "resumed-4" / "sit", root / "none-1" / "sit", STEPS)
    compare(resume_generator("sit", root, "none", "resumed-1"), root / "none-1" / "sit", STEPS)


def test_power_averages_of_parts_are_written_whole(root: Path) -> None:
    for case, step in (("gan", 4), ("mar", STEPS)):
        kept = [
            read_tensors(root / how / case / f"averages/step-{step:08d}.safetensors")[0] for how in ("fsdp-4", "none-1")
        ]
        assert kept[0].keys() == kept[1].keys()
        for name, value in kept[0].items():
            torch.testing.assert_close(value, kept[1][name], rtol=1e-2, atol=1e-4)
