"""Replayed CUDA graphs compute what the same steps compute without them; where there is no GPU they change nothing."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from softvq.data.latent_set import LatentBatch
from softvq.errors import InputError
from softvq.generators.generator import LatentGenerator
from softvq.generators.presets import generator_preset
from softvq.training.generator_task import GeneratorTask
from softvq.training.optim import OptimConfig
from softvq.training.tokenizer_recipe import build_task
from softvq.training.train_config import TrainConfig
from softvq.training.trainer import Trainer
from tests import family


def trainer(run: Path, name: str, **train: object) -> Trainer:
    config = family.recipe(family.QUANTIZERS[name], every_flag=True, steps=20, **train)
    task = build_task(config, torch.device(config.train.device))
    return Trainer(task, run, config.train, config.optim, seed=0, console=Console(quiet=True))


def test_recording_needs_whole_batches() -> None:
    with pytest.raises(InputError, match="cuda_graph is true, which needs accumulate 1; it is 2"):
        TrainConfig(cuda_graph=True, accumulate=2)


def test_on_the_cpu_nothing_is_recorded(tmp_path: Path) -> None:
    plain, asked = (trainer(tmp_path, "softvq", cuda_graph=asked) for asked in (False, True))
    config = family.recipe(family.QUANTIZERS["softvq"])
    for step in range(2):
        reports = [ours.update(family.pictures(config, step)) for ours in (plain, asked)]
        assert all(torch.equal(reports[0][name], reports[1][name]) for name in reports[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(family.QUANTIZERS))
def test_replayed_steps_equal_those_that_are_not(name: str, tmp_path: Path) -> None:
    config = family.recipe(family.QUANTIZERS[name])
    common = {"device": "cuda", "precision": "fp32"}
    plain, recorded = (trainer(tmp_path, name, cuda_graph=graph, **common) for graph in (False, True))
    for step in range(12):  # phases: before the discriminator, its warm-up, and any number of tokens
        batch = family.pictures(config, step)
        for ours in (plain, recorded):
            ours.step = step
        expected, found = plain.update(batch), recorded.update(batch)
        assert expected.keys() == found.keys()
        for key in expected:
            assert found[key].item() == pytest.approx(expected[key].item(), rel=2e-2, abs=1e-4), (step, key)
    assert recorded._recorder is not None
    assert recorded._recorder._recordings
    for ours, theirs in zip(plain.task.parameters(), recorded.task.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["sit-tiny", "dit-tiny", "mar-tiny"])
def test_replayed_steps_of_generators_equal_those_that_are_not(kind: str, compiled: bool, tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # which need not be the current one
    trainers = []
    for graph in (False, True):
        torch.manual_seed(0)
        generator = LatentGenerator(generator_preset(kind, num_tokens=16, latent_dim=8, num_classes=5))
        settings = TrainConfig(
            batch_size=8, device=str(device), precision="fp32", compile=compiled and graph, cuda_graph=graph
        )
        task, optim = GeneratorTask(generator, seed=0), OptimConfig(lr=1e-3)
        trainers.append(Trainer(task, tmp_path, settings, optim, seed=0, console=Console(quiet=True)))
    for step in range(8):
        positions = torch.arange(8 * step, 8 * step + 8, device=device)
        latents = torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(step)).to(device)
        batch = LatentBatch(latents=latents, labels=positions % 5, positions=positions)
        expected, found = (ours.update(batch) for ours in trainers)
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-3), step
    assert trainers[1]._recorder is not None
    assert trainers[1]._recorder._recordings
    for ours, theirs in zip(*(one.task.parameters() for one in trainers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
