"""Phases of a run: which there are, and that rehearsing them leaves nothing behind and names what fails."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from softvq.config import from_dict
from softvq.errors import InputError, RunError
from softvq.losses.perceptual import PerceptualDistance
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training import rehearsal, tokenizer_recipe
from softvq.training.adversary import Adversary
from softvq.training.rehearsal import Phase, heaviest_step, phases, rehearse
from softvq.training.tokenizer_recipe import TokenizerRunConfig, build_task
from softvq.training.tokenizer_task import LossConfig
from softvq.training.trainer import Trainer
from tests import family
from tests.program import Program, contents, make_photos, write_recipe

PATCHGAN = {"discriminator": {"kind": "patchgan", "width": 4, "depth": 1}}
TEACHER = {"teacher": "test_vit", "pretrained": False, "hidden": 8}


def recipe(loss: dict[str, Any], **train: Any) -> TokenizerRunConfig:
    plain = family.recipe(family.SOFT, **{"steps": 20, "batch_size": 4, **train})
    return dataclasses.replace(plain, loss=from_dict(LossConfig, {"perceptual_weight": 0.0, **loss}))


def names(config: TokenizerRunConfig) -> list[tuple[str, int]]:
    return [(phase.name, phase.first_step) for phase in phases(config)]


def run(config: TokenizerRunConfig) -> tuple[list[Phase], list[str]]:
    warnings: list[str] = []
    return list(rehearse(config, Console(quiet=True), warnings.append)), warnings


@pytest.fixture(autouse=True)
def small_perceptual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_recipe, "load_perceptual", lambda _: PerceptualDistance((4,), (1,)))


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Go to an empty folder and see that it stays so."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


PERCEPTUAL = {"perceptual_weight": 1.0, "perceptual_warmup_steps": 0}
CASES: list[tuple[dict[str, Any], list[tuple[str, int]]]] = [
    ({}, [("pixels", 0)]),
    ({"perceptual_weight": 1.0}, [("pixels", 0), ("pixels + perceptual", 1)]),  # its ramp starts at 0
    (PERCEPTUAL, [("pixels + perceptual", 0)]),
    ({**PERCEPTUAL, "perceptual_start": 7}, [("pixels", 0), ("pixels + perceptual", 7)]),
    ({"perceptual_weight": 1.0, "perceptual_start": 7}, [("pixels", 0), ("pixels + perceptual", 8)]),
    ({**PERCEPTUAL, "perceptual_start": 20}, [("pixels", 0)]),
    ({"perceptual_weight": 1.0, "perceptual_start": 19}, [("pixels", 0)]),
    ({"adversarial": {**PATCHGAN, "start": 0}}, [("pixels + adversarial", 0)]),
    ({"adversarial": {**PATCHGAN, "start": 19, "warmup_steps": 9}}, [("pixels", 0), ("pixels + adversarial", 19)]),
    ({"adversarial": {**PATCHGAN, "start": 20}}, [("pixels", 0)]),
    (
        {**PERCEPTUAL, "adversarial": {**PATCHGAN, "start": 3}},
        [("pixels + perceptual", 0), ("pixels + perceptual + adversarial", 3)],
    ),
    (
        {**PERCEPTUAL, "perceptual_start": 5, "adversarial": {**PATCHGAN, "start": 2}, "alignment": TEACHER},
        [
            ("pixels + alignment", 0),
            ("pixels + adversarial + alignment", 2),
            ("pixels + perceptual + adversarial + alignment", 5),
        ],
    ),
]


@pytest.mark.parametrize(("loss", "expected"), CASES)
def test_phases_are_where_something_begins(loss: dict[str, Any], expected: list[tuple[str, int]]) -> None:
    assert names(recipe(loss)) == expected


def test_phases_beyond_a_shorter_run_are_left_out() -> None:
    loss = {"perceptual_weight": 1.0, "adversarial": {**PATCHGAN, "start": 3}}
    assert [len(phases(recipe(loss, steps=steps))) for steps in (1, 2, 3, 4, 20)] == [1, 2, 2, 3, 3]


def test_every_phase_is_measured_and_nothing_is_left_behind(empty: Path) -> None:
    config = recipe({"perceptual_weight": 1.0, "adversarial": {**PATCHGAN, "start": 3}, "alignment": TEACHER})
    found, warnings = run(config)
    assert [(phase.name, phase.first_step) for phase in found] == names(config)
    assert len(found) == 3
    assert all(phase.seconds > 0 for phase in found)
    assert all(2**20 < phase.memory < 2**40 for phase in found)
    assert warnings == []


def test_the_discriminators_parameters_count_where_it_is_trained(empty: Path) -> None:
    config = recipe({**PERCEPTUAL, "adversarial": {**PATCHGAN, "start": 3}, "alignment": TEACHER})
    task = tokenizer_recipe.build_task(config, torch.device("cpu"))
    assert task.critic is not None
    ours = sum(p.numel() for p in task.tokenizer.parameters()) + sum(
        p.numel() for p in task.heads["projector"].parameters()
    )
    theirs = sum(p.numel() for p in task.critic.parameters())
    assert [phase.parameters for phase in run(config)[0]] == [ours, ours + theirs]


def test_each_phase_is_updated_a_few_times_at_its_first_step(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, bool]] = []
    original = Trainer.update

    def noting(self: Trainer, batch: Any) -> dict[str, Tensor]:
        report = original(self, batch)
        assert batch.images.shape == (4, 3, 32, 32)
        steps.append((self.step, "critic_loss" in report))
        return report

    monkeypatch.setattr(Trainer, "update", noting)
    run(recipe({"adversarial": {**PATCHGAN, "start": 3}}))
    count = rehearsal.UNTIMED_UPDATES + rehearsal.TIMED_UPDATES
    assert steps == [(0, False)] * count + [(3, True)] * count


def fails(self: Adversary, *_: object) -> tuple[Tensor, dict[str, Tensor]]:
    raise RunError("the discriminator is broken")


def spoils(self: Adversary, *_: object) -> tuple[Tensor, dict[str, Tensor]]:
    return next(self.parameters()).sum() * float("nan"), {}


def exhausts(self: Adversary, *_: object) -> tuple[Tensor, dict[str, Tensor]]:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (fails, "the discriminator is broken"),
        (spoils, "the loss or its gradient is not finite"),
        (exhausts, "out of memory in the forward pass of the critic; raise train.accumulate"),
    ],
)
def test_a_phase_that_fails_is_named(forward: Any, reason: str, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adversary, "forward", forward)
    stages = rehearse(recipe({"adversarial": {**PATCHGAN, "start": 3}}), Console(quiet=True), lambda _: None)
    assert next(stages).name == "pixels"
    with pytest.raises(RunError, match=rf"phase 'pixels \+ adversarial', from step 3: .*{reason}"):
        next(stages)


def test_a_first_phase_that_fails_is_named_too(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nan(nn.Module):
        def forward(self, images: Tensor, targets: Tensor) -> Tensor:
            return images.sum(dim=(1, 2, 3)) * float("nan")

    monkeypatch.setattr(tokenizer_recipe, "load_perceptual", lambda _: Nan())
    with pytest.raises(RunError, match=r"phase 'pixels \+ perceptual', from step 0: step 1: the loss"):
        run(recipe(PERCEPTUAL))


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ({"alignment": {**TEACHER, "weights": "absent.safetensors"}}, "absent.safetensors"),
        ({"alignment": {**TEACHER, "teacher": "no_such_network"}}, "no_such_network"),
        ({"adversarial": {"discriminator": {"kind": "patchgan", "depth": 8}}}, "PatchGAN of depth 8"),
    ],
)
def test_what_cannot_be_built_is_named(loss: dict[str, Any], reason: str, empty: Path) -> None:
    with pytest.raises(InputError, match=f"phase 'build': .*{reason}"):
        run(recipe(loss))


def test_a_tokenizer_to_start_from_that_is_not_there_is_named(empty: Path) -> None:
    config = dataclasses.replace(recipe({}), start_from="./absent")
    with pytest.raises(InputError, match=r"phase 'build': .*absent"):
        run(config)


def test_weights_that_do_not_fit_into_memory_are_refused_first(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "BYTES_PER_WEIGHT", 1 << 45)
    with pytest.raises(
        RunError, match=r"phase 'build': .* GiB are needed for weights and their state alone, .* are free"
    ):
        run(recipe({}))


def test_more_than_one_process_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a dry run is of one process; run it without torchrun"):
        run(recipe({}))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(run(recipe({}))[0]) == 1


@pytest.mark.parametrize(("start", "expected"), [(19, []), (20, [20]), (21, [21])])
def test_a_discriminator_that_never_starts_is_told_of(start: int, expected: list[int], empty: Path) -> None:
    _, warnings = run(recipe({"adversarial": {**PATCHGAN, "start": start}}))
    assert warnings == [f"the discriminator starts at step {step}, but the run ends at 20" for step in expected]


def test_a_rehearsal_of_a_part_trains_that_part(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = recipe({})
    tokenizer = tokenizer_recipe.build_task(whole, torch.device("cpu")).tokenizer
    folder = tmp_path_factory.mktemp("start")
    tokenizer.save_pretrained(folder)
    found, warnings = run(dataclasses.replace(whole, start_from=str(folder), decoder_only=True))
    parts = (tokenizer.decoder, tokenizer.from_latents)
    assert found[0].parameters == sum(p.numel() for part in parts for p in part.parameters())
    assert warnings == [f"{folder}: starts from its weights"]


def test_the_program_prints_the_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = Program(capsys)
    make_photos(tmp_path / "photos")
    path = write_recipe(tmp_path / "recipe.yaml", loss__adversarial={**PATCHGAN, "start": 1}, train__steps=5)
    before = contents(tmp_path)
    common = ("train", "tokenizer", "--config", path, "--data", tmp_path / "photos", "--dry-run")
    result = program(*common, "--run", tmp_path / "run")
    assert (result.code, result.err) == (0, "")
    rows = [line for line in result.out.splitlines() if line.startswith("│ pixels")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert [row[:2] for row in cells] == [["pixels", "0"], ["pixels + adversarial", "1"]]
    counts = [int(row[2].replace(",", "")) for row in cells]
    assert counts[1] > counts[0] > 0
    assert all(float(row[3]) >= 0 and float(row[4].replace(",", "")) > 0 and float(row[5]) > 0 for row in cells)
    late = program(*common, "loss.adversarial.start=9")
    assert late.code == 0
    assert "the discriminator starts at step 9, but the run ends at 5" in late.err
    refused = program(*common, 'loss.alignment={"teacher": "test_vit", "weights": "absent.safetensors"}')
    assert refused.code == 2
    assert "phase 'build': " in refused.err
    assert "absent.safetensors" in refused.err
    assert contents(tmp_path) == before


def test_where_the_number_of_tokens_varies_the_most_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = family.recipe(family.SOFT)
    config = dataclasses.replace(config, seed=1, model=dataclasses.replace(config.model, min_latent_tokens=1))
    counts: list[int] = []
    forward = ImageTokenizer.forward

    def counted(self: ImageTokenizer, *arguments: Any, **options: Any) -> Any:
        counts.append(options["num_tokens"])
        return forward(self, *arguments, **options)

    monkeypatch.setattr(ImageTokenizer, "forward", counted)
    run(config)
    assert set(counts) == {4}


def test_theheaviest_step_is_of_the_phase_it_stands_for() -> None:
    config = family.recipe(family.SOFT)
    config = dataclasses.replace(config, seed=1, model=dataclasses.replace(config.model, min_latent_tokens=1))
    loss = from_dict(LossConfig, {"perceptual_weight": 0.0, "adversarial": {**PATCHGAN, "start": 2}})
    task = build_task(dataclasses.replace(config, loss=loss), torch.device("cpu"))
    assert heaviest_step(task, 0) in {0, 1}
    assert heaviest_step(task, 2) >= 2
    assert task.phase(heaviest_step(task, 2))[2] == 4
