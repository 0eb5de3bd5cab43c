"""Training a generator from files to files: what a run leaves, that it goes on exactly, alone or as two processes."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from softvq.config import from_dict, read_yaml
from softvq.errors import InputError, Interrupted, RunError
from softvq.files import read_tensors, sha256
from softvq.pipeline import GenerationPipeline
from softvq.training import generator_run
from softvq.training.checkpoint import latest
from softvq.training.generator_recipe import GeneratorRunConfig
from softvq.training.generator_run import build_generator, train_generator
from softvq.training.tracking import read_log
from tests.generators import CLASSES, KINDS, STEPS, make_cache, quick, run_config
from tests.program import SIZE, contents, make_photos
from tests.ranks import run_as_ranks

LEFT = {"config.yaml", "run.json", "log.jsonl", "status.json", "checkpoints", "generator", ".lock"}
STATE = f"checkpoints/step-{STEPS:08d}/state.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold photographs, a tokenizer and a cache, which no test changes."""
    root = tmp_path_factory.mktemp("root")
    make_cache(root)
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[str, Path]:
    """Train every kind without a pause."""
    return {kind: train_generator(run_config(kind, latents=root / "cache"), root / kind).parent for kind in KINDS}


def outcome(run: Path) -> dict[str, Any]:
    log = [{name: value for name, value in line.items() if name != "clock"} for line in read_log(run / "log.jsonl")]
    return {"log": log, **{name: sha256(run / name) for name in (STATE, "generator/model.safetensors")}}


def stopping(batches: Iterator[Any], at: int, number: int) -> Iterator[Any]:
    for place, batch in enumerate(batches):
        if place == at:
            os.kill(os.getpid(), number)
        yield batch


def stop(patch: pytest.MonkeyPatch, at: int, number: int) -> None:
    """Let this process get a signal when it fetches a batch."""
    own = generator_run._source

    def source(*arguments: Any) -> Any:
        made = own(*arguments)
        stream = made.stream
        object.__setattr__(made, "stream", lambda start, count: stopping(stream(start, count), at, number))
        return made

    patch.setattr(generator_run, "_source", source)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_generator_behind(kind: str, root: Path, whole: dict[str, Path]) -> None:
    run = whole[kind]
    assert {path.name for path in run.iterdir()} == LEFT
    config = run_config(kind, latents=root / "cache")
    assert from_dict(GeneratorRunConfig, read_yaml(run / "config.yaml")) == config
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"]["images"] == 12
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    lines = read_log(run / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss", "lr", "grad_norm"} <= set(lines[0])
    assert ("loss_at_1_8" in lines[0]) == (kind != "mar")
    assert ({"mse", "vlb"} <= set(lines[0])) == (kind != "sit")
    if kind != "sit":
        assert lines[0]["mse"] + lines[0]["vlb"] == pytest.approx(lines[0]["loss"], rel=1e-5)
    pipeline = GenerationPipeline.from_pretrained(run / "generator")
    assert pipeline.generator.classes == CLASSES
    assert pipeline.generator.tokenizer.name == "tokenizer"
    assert pipeline.generator.sampling == quick(kind, ema="0.5")
    saved, _ = read_tensors(run / STATE)
    for name, parameter in pipeline.generator.named_parameters():
        assert torch.equal(parameter, saved[f"ema.{name}"])
    assert not torch.equal(saved["ema.network.to_tokens.weight"], saved["model.network.to_tokens.weight"])


def test_the_card_of_a_run_has_its_recipe(root: Path, whole: dict[str, Path]) -> None:
    text = (whole["sit"] / "generator/README.md").read_text()
    facts = json.loads((whole["sit"] / "run.json").read_text())["data"]
    assert f"**Data**: 12 images with the fingerprint `{facts['fingerprint'][:12]}`" in text
    (root / "again.yaml").write_text(text.partition("```yaml\n")[2].removesuffix("```\n"))
    again, config = from_dict(GeneratorRunConfig, read_yaml(root / "again.yaml")), run_config("sit")
    assert (again.model, again.optim, again.sampling, again.seed) == (
        config.model, config.optim, config.sampling, config.seed,
    )  # fmt: skip
    assert (again.train.steps, again.train.batch_size) == (STEPS, config.train.batch_size)
    loss = read_log(whole["sit"] / "log.jsonl")[-1]["loss"]
    assert f"training loss {loss:.4g} at step {STEPS}." in text
    assert str(root) not in text  # a card goes to others, who need not know where files were
    assert "- **Licence**: not chosen" in (whole["sit"] / "generator/tokenizer/README.md").read_text()


def test_everything_is_trained(whole: dict[str, Path]) -> None:
    for kind, run in whole.items():
        start = build_generator(run_config(kind)).state_dict()
        saved, _ = read_tensors(run / STATE)
        same = [name for name, value in start.items() if torch.equal(saved[f"model.{name}"], value)]
        assert same == ([] if kind == "mar" else ["network.positions"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_goes_on_exactly(
    kind: str, root: Path, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(kind, latents=root / "cache")
    with monkeypatch.context() as patch:
        stop(patch, 3, signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM at step 4, saved at step 4"):
            train_generator(config, tmp_path / "run")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "interrupted"
    assert not (tmp_path / "run/generator").exists()
    train_generator(config, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole[kind])
    before = contents(tmp_path / "run/generator")
    train_generator(config, tmp_path / "run", resume=True)  # what is finished stays as it is
    assert contents(tmp_path / "run/generator") == before


def train_and_die(root: Path, folder: Path) -> None:
    """Train every kind in a process of its own, which is killed at its fifth step."""
    for kind in KINDS:
        pid = os.fork()
        if not pid:
            with pytest.MonkeyPatch.context() as patch:
                stop(patch, 4, signal.SIGKILL)
                train_generator(run_config(kind, latents=root / "cache"), folder / kind)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_a_run_that_is_killed_goes_on_exactly(root: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    run_as_ranks(train_and_die, root, tmp_path, count=1)
    for kind in KINDS:
        found = latest(tmp_path / kind)
        assert found is not None
        assert found.step == 3
        train_generator(run_config(kind, latents=root / "cache"), tmp_path / kind, resume=True)
        assert outcome(tmp_path / kind) == outcome(whole[kind])


def train_as_rank(root: Path, folder: Path) -> None:
    for kind, port in zip(KINDS, os.environ["PORTS"].split(), strict=True):
        os.environ["MASTER_PORT"] = port
        train_generator(run_config(kind, latents=root / "cache"), folder / kind)


def test_two_processes_learn_what_one_does(root: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / kind).mkdir()
    run_as_ranks(train_as_rank, root, tmp_path, meetings=len(KINDS))
    for kind in KINDS:
        two, one = read_log(tmp_path / kind / "log.jsonl"), read_log(whole[kind] / "log.jsonl")
        assert len(two) == len(one) == STEPS
        for ours, alone in zip(two, one, strict=True):
            assert ours.keys() == alone.keys()
            for key in sorted(ours.keys() - {"clock"}):
                assert ours[key] == pytest.approx(alone[key], rel=1e-4 if key == "grad_norm" else 1e-5), (kind, key)
        ours, _ = read_tensors(tmp_path / kind / "generator/model.safetensors")
        alone, _ = read_tensors(whole[kind] / "generator/model.safetensors")
        for name, value in alone.items():
            torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)


def test_more_averages_change_no_weight(root: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    averages = {"train__more_ema_decays": [0.9], "train__ema_lengths": [0.1, 0.2]}
    train_generator(run_config("sit", latents=root / "cache", **averages), tmp_path / "run")
    files = sorted(path.name for path in (tmp_path / "run/averages").iterdir())
    assert files == ["step-00000003.safetensors", "step-00000006.safetensors"]
    found, plain = outcome(tmp_path / "run"), outcome(whole["sit"])
    assert found["log"] == plain["log"]
    ours, one = (read_tensors(run / STATE)[0] for run in (tmp_path / "run", whole["sit"]))
    assert one.keys() < ours.keys()
    assert all(torch.equal(ours[name], value) for name, value in one.items())


def test_micro_batches_change_nothing_but_last_bits(root: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    train_generator(run_config("sit", latents=root / "cache", train__accumulate=2), tmp_path / "run")
    two, one = read_log(tmp_path / "run/log.jsonl"), read_log(whole["sit"] / "log.jsonl")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)


def test_photographs_are_encoded_on_the_fly(root: Path, tmp_path: Path) -> None:
    config = run_config("sit", data__path=str(root / "photos"), tokenizer=root / "model", train__save_every=4)
    run = train_generator(config, tmp_path / "run").parent
    pipeline = GenerationPipeline.from_pretrained(run / "generator")
    assert pipeline.generator.classes == CLASSES
    assert pipeline(["bee"]).isfinite().all()
    saved, _ = read_tensors(run / STATE)
    assert not [name for name in saved if "encoder" in name]  # the tokenizer is neither trained nor saved
    train_generator(config, tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(run)


def test_sample_grids_are_drawn_of_the_average(root: Path, tmp_path: Path) -> None:
    config = run_config("sit", latents=root / "cache", train__sample_every=4, train__steps=5, train__save_every=5)
    run = train_generator(config, tmp_path / "run").parent
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000004.png", "step-00000005.png"]
    with Image.open(run / "samples/step-00000005.png") as grid:
        assert grid.size == (4 * SIZE, 4 * SIZE)
    found = [line["samples"] for line in read_log(run / "log.jsonl") if "samples" in line]
    assert [line.keys() for line in found] == [{"latent_std"}] * 2


def test_sampling_may_change_and_the_model_may_not(root: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    config = run_config("sit", latents=root / "cache", train__steps=3)
    run = train_generator(config, tmp_path / "run").parent
    weights, _ = read_tensors(run / "generator/model.safetensors")
    free = {"sampling": {"steps": 7, "sampler": "euler", "guidance": {"scale": 2.0}}, "train__log_every": 2}
    free["tokenizer"] = root / "model"
    train_generator(run_config("sit", latents=root / "cache", train__steps=3, **free), run, resume=True)
    stored = GenerationPipeline.from_pretrained(run / "generator").generator.sampling
    assert (stored.steps, stored.sampler, stored.guidance.scale) == (7, "euler", 2.0)
    after, _ = read_tensors(run / "generator/model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    model = {"model__label_dropout": 0.2}
    with pytest.raises(InputError, match=r"model\.label_dropout was 0\.1, is 0\.2"):
        train_generator(run_config("sit", latents=root / "cache", train__steps=3, **model), run, resume=True)
    with pytest.raises(InputError, match=r"seed was 0, is 1"):
        train_generator(run_config("sit", latents=root / "cache", train__steps=3, seed=1), run, resume=True)
    with pytest.raises(InputError, match=r"flip was True, is False"):
        train_generator(run_config("sit", latents=root / "cache", train__steps=3, flip=False), run, resume=True)


def test_a_cache_that_moved_is_the_same_and_another_is_refused(root: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "same")
    make_cache(tmp_path / "flat", flip=False)
    run = train_generator(run_config("sit", latents=root / "cache", train__steps=3), tmp_path / "run").parent
    before = contents(run / "checkpoints")
    train_generator(run_config("sit", latents=tmp_path / "same/cache", train__steps=3), run, resume=True)
    with pytest.raises(InputError, match=r"flat/cache: is not the data set .* was started with"):
        train_generator(run_config("sit", latents=tmp_path / "flat/cache", train__steps=3), run, resume=True)
    assert contents(run / "checkpoints") == before


def test_other_photographs_are_refused_on_resume(root: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", ("ant/0.png", "bee/1.png", "cat/2.png", "cat/3.png"))
    config = run_config("sit", data__path=str(tmp_path / "photos"), tokenizer=root / "model", train__steps=1)
    train_generator(config, tmp_path / "run")
    (tmp_path / "photos/cat/3.png").unlink()
    with pytest.raises(InputError, match=r"photos: is not the data set .* \(it had 4 images, now 3\)"):
        train_generator(config, tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Any, latents: Any, *others: Any) -> dict[str, Any]:
        return {"mse": sum(p.sum() for p in self.parameters()) * torch.nan + torch.zeros(len(latents))}

    monkeypatch.setattr(generator_run.LatentGenerator, "losses", poisoned)
    with pytest.raises(RunError, match=r"step 1: the loss or its gradient is not finite"):
        train_generator(run_config("sit", latents=root / "cache"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
