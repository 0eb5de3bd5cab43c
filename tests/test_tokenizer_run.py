import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from softvq.config import from_dict, read_yaml, to_dict
from softvq.errors import InputError, Interrupted, RunError
from softvq.files import read_tensors, sha256
from softvq.locks import folder_lock
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.presets import preset
from softvq.training import run_folder, tokenizer_run
from softvq.training.checkpoint import latest
from softvq.training.tokenizer_recipe import TokenizerRunConfig, expand_preset, idle_settings
from softvq.training.tokenizer_run import train_tokenizer
from softvq.training.tracking import read_log

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
STEPS = 6


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    draws = np.random.default_rng(0)
    for number in range(6):
        path = folder / ("cats" if number % 2 else "dogs") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = draws.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        Image.fromarray(blocks).resize((50, 44), Image.Resampling.BICUBIC).save(path)
    return folder


def config(photographs: Path, **changes: object) -> TokenizerRunConfig:
    vit = {"width": 16, "depth": 1, "num_heads": 2}
    quantizer = {"kind": "softvq", "codebook_size": 16, "num_codebooks": 2}
    sizes = {"num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8}
    train = {"batch_size": 4, "steps": STEPS, "log_every": 2, "save_every": 3, "sample_every": 4, "device": "cpu"}
    data = {
        "model": {"encoder": vit, "decoder": vit, "quantizer": quantizer, **sizes},
        "data": {"path": str(photographs)},
        "loss": {"perceptual_weight": 0.0},
        "optim": {"lr": 1e-3},
        "train": {**train, "ema_decay": 0.5},
    }
    for dotted, value in changes.items():
        group, _, name = dotted.partition("__")
        if name:
            data[group][name] = value
        else:
            data[group] = value
    return from_dict(TokenizerRunConfig, data)


def snapshot(folder: Path) -> dict[str, str]:
    skipped = {".lock", "status.json"}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in skipped)
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def test_a_run_leaves_everything_behind(tmp_path: Path, photographs: Path) -> None:
    run = tmp_path / "run"
    assert train_tokenizer(config(photographs), run) == run / "tokenizer"
    expected = {"config.yaml", "run.json", "log.jsonl", "status.json", "checkpoints", "samples", "tokenizer", ".lock"}
    assert {path.name for path in run.iterdir()} == expected
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000004.png", "step-00000006.png"]
    with Image.open(run / "samples/step-00000004.png") as grid:
        assert grid.size == (6 * 32, 2 * 32)
    samples = [record["samples"] for record in read_log(run / "log.jsonl") if "samples" in record]
    assert set(samples[0]) == {"psnr"}
    assert {"usage", "perplexity", "loss"} <= set(read_log(run / "log.jsonl")[0])
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"]["images"] == 6
    assert {"softvq", "torch", "python"} <= set(facts["versions"])
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert from_dict(TokenizerRunConfig, read_yaml(run / "config.yaml")) == config(photographs)


def test_the_tokenizer_that_is_saved_is_the_average_with_fitted_statistics(tmp_path: Path, photographs: Path) -> None:
    tokenizer = ImageTokenizer.from_pretrained(train_tokenizer(config(photographs), tmp_path / "run"))
    found = latest(tmp_path / "run")
    assert found is not None
    saved, _ = read_tensors(found.folder / "state.safetensors")
    for name, parameter in tokenizer.named_parameters():
        assert torch.equal(parameter, saved[f"ema.tokenizer.{name}"])
    assert not torch.equal(saved["ema.tokenizer.to_latents.weight"], saved["model.tokenizer.to_latents.weight"])
    images = torch.stack(list(tokenizer_run._first_images(config(photographs))))  # all six of them
    latents = tokenizer.encode(images)
    assert latents.mean().item() == pytest.approx(0.0, abs=0.05)
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)


def test_a_finished_run_is_resumed_to_the_same_files(tmp_path: Path, photographs: Path) -> None:
    train_tokenizer(config(photographs), tmp_path / "run")
    before = snapshot(tmp_path / "run")
    train_tokenizer(config(photographs), tmp_path / "run", resume=True)
    assert snapshot(tmp_path / "run") == before


def test_photographs_for_the_samples_may_be_held_out(tmp_path: Path, photographs: Path) -> None:
    apart = tmp_path / "held_out"
    apart.mkdir()
    Image.new("RGB", (40, 40), (255, 0, 0)).save(apart / "red.png")
    (apart / "broken.jpg").write_bytes(b"no image")
    train_tokenizer(config(photographs, held_out=str(apart)), tmp_path / "run")
    with Image.open(tmp_path / "run/samples/step-00000004.png") as grid:
        assert grid.size == (32, 64)
        assert grid.getpixel((16, 16)) == (255, 0, 0)


def test_an_existing_folder_is_not_touched_without_resume(tmp_path: Path, photographs: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match=r"run: is not empty; add --resume .* or choose another folder"):
        train_tokenizer(config(photographs), run)
    assert snapshot(run).keys() == {"diary.txt"}


def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path: Path, photographs: Path) -> None:
    with pytest.raises(InputError, match=r"run: no such run to resume"):
        train_tokenizer(config(photographs), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_not_resumed_into(tmp_path: Path, photographs: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"is no run to resume, it holds thesis\.txt"):
        train_tokenizer(config(photographs), tmp_path / "other", resume=True)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, photographs: Path) -> None:
    (tmp_path / "run").mkdir()
    train_tokenizer(config(photographs), tmp_path / "run", resume=True)
    train_tokenizer(config(photographs), tmp_path / "whole")
    states = [latest(tmp_path / name) for name in ("run", "whole")]
    assert len({sha256(state.folder / "state.safetensors") for state in states if state}) == 1


def test_a_changed_config_is_refused_with_the_differences(tmp_path: Path, photographs: Path) -> None:
    train_tokenizer(config(photographs), tmp_path / "run")
    before = snapshot(tmp_path / "run")
    changed = config(photographs, optim__lr=2e-3, train__steps=9)
    with pytest.raises(InputError, match=r"optim.lr was 0.001, is 0.002; train.steps was 6, is 9"):
        train_tokenizer(changed, tmp_path / "run", resume=True)
    assert snapshot(tmp_path / "run") == before


def test_what_changes_no_result_may_change(tmp_path: Path, photographs: Path) -> None:
    moved = photographs.rename(tmp_path / "moved")
    train_tokenizer(config(moved, data__num_workers=0), tmp_path / "run")
    moved.rename(photographs)
    changed = config(photographs, train__log_every=1, train__keep=1, data__num_workers=1, data__cache_megabytes=0)
    train_tokenizer(changed, tmp_path / "run", resume=True)
    assert from_dict(TokenizerRunConfig, read_yaml(tmp_path / "run/config.yaml")) == changed


def test_a_constant_schedule_may_be_trained_for_longer(tmp_path: Path, photographs: Path) -> None:
    constant = {"lr": 1e-3, "schedule": "constant"}
    train_tokenizer(config(photographs, optim=constant), tmp_path / "run")
    train_tokenizer(config(photographs, optim=constant, train__steps=9), tmp_path / "run", resume=True)
    train_tokenizer(config(photographs, optim=constant, train__steps=9), tmp_path / "whole")
    names = ["checkpoints/step-00000009/state.safetensors", "tokenizer/model.safetensors"]
    for name in names:
        assert sha256(tmp_path / "run" / name) == sha256(tmp_path / "whole" / name)


def test_a_changed_data_set_is_refused(tmp_path: Path, photographs: Path) -> None:
    train_tokenizer(config(photographs), tmp_path / "run")
    next(photographs.rglob("*.jpg")).unlink()
    with pytest.raises(
        InputError, match=r"photographs: is not the data set .*run was started with .*had 6 images, now 5"
    ):
        train_tokenizer(config(photographs), tmp_path / "run", resume=True)


def test_a_checkpoint_of_other_software_is_used_with_a_warning(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tokenizer(config(photographs), tmp_path / "run")
    versions = run_folder._versions()
    monkeypatch.setattr(run_folder, "_versions", lambda: {**versions, "torch": "99.0"})
    with (tmp_path / "out").open("w+") as file:
        train_tokenizer(config(photographs), tmp_path / "run", resume=True, console=Console(file=file))
        file.seek(0)
        text = file.read()
    assert f"the checkpoint was made with torch {versions['torch']}, now 99.0: results may differ" in text


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path, photographs: Path) -> None:
    with folder_lock(tmp_path / "run", "trained"), pytest.raises(InputError, match="is being trained by process"):
        train_tokenizer(config(photographs), tmp_path / "run", resume=True)


def test_damaged_checkpoints_are_passed_over_then_refused(tmp_path: Path, photographs: Path) -> None:
    run = tmp_path / "run"
    train_tokenizer(config(photographs), run)
    before = snapshot(run)
    newest, older = run / "checkpoints/step-00000006", run / "checkpoints/step-00000003"
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(data)
    train_tokenizer(config(photographs), run, resume=True)
    after = snapshot(run)
    assert all(after[name] == value for name, value in before.items() if name != "log.jsonl")
    for folder in (newest, older):
        (folder / "state.json").unlink()
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        train_tokenizer(config(photographs), run, resume=True)


def test_a_signal_is_written_down(tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    original = tokenizer_run.batches

    def interrupted(*args: object):
        for number, batch in enumerate(original(*args)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(tokenizer_run, "batches", interrupted)
    with pytest.raises(Interrupted, match="SIGTERM at step 4, saved at step 4"):
        train_tokenizer(config(photographs), tmp_path / "run")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", 4)
    monkeypatch.setattr(tokenizer_run, "batches", original)
    train_tokenizer(config(photographs), tmp_path / "run", resume=True)
    train_tokenizer(config(photographs), tmp_path / "whole")
    name = "tokenizer/model.safetensors"
    assert sha256(tmp_path / "run" / name) == sha256(tmp_path / "whole" / name)


@pytest.mark.parametrize("path", [None, "missing"])
def test_a_data_set_that_is_not_there_is_refused(tmp_path: Path, path: str | None) -> None:
    missing = str(tmp_path / path) if path else None
    settings = dataclasses.replace(config(tmp_path), data=dataclasses.replace(config(tmp_path).data, path=missing))
    with pytest.raises(InputError, match=r"data.path is not set|missing"):
        train_tokenizer(settings, tmp_path / "run")


def test_a_preset_is_written_out_and_can_be_overruled() -> None:
    data = expand_preset({"model": {"preset": "softvq-s-64", "encoder": {"depth": 2}, "image_size": 128}, "seed": 1})
    built = from_dict(TokenizerRunConfig, data)
    named = preset("softvq-s-64")
    shallow = dataclasses.replace(named.encoder, depth=2)
    assert built.model == dataclasses.replace(named, encoder=shallow, image_size=128)
    assert built.seed == 1


def test_a_quantizer_of_another_kind_replaces_the_presets() -> None:
    data = expand_preset({"model": {"preset": "softvq-s-64", "quantizer": {"kind": "none"}}})
    assert data["model"]["quantizer"] == {"kind": "none"}


def test_without_a_preset_nothing_changes() -> None:
    assert expand_preset({"seed": 1}) == {"seed": 1}
    assert expand_preset({"model": {"image_size": 64}}) == {"model": {"image_size": 64}}


def test_a_preset_that_is_no_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.preset is 3, expected a name"):
        expand_preset({"model": {"preset": 3}})


def test_a_perceptual_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loss.perceptual_size is 24, expected a divisor of model.image_size \(32\)"):
        config(tmp_path, loss__perceptual_size=24)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_whole(path: Path) -> None:
    settings = from_dict(TokenizerRunConfig, expand_preset(read_yaml(path)), str(path))
    with torch.device("meta"):
        ImageTokenizer(settings.model)
    assert from_dict(TokenizerRunConfig, to_dict(settings)) == settings
    header = path.read_text().split("\n\n")[0]
    assert all(word in header for word in ("softvq train tokenizer", "Hardware:", "Expectation:", "Source:"))


def test_a_mistake_found_while_building_leaves_a_folder_that_can_be_used(tmp_path: Path, photographs: Path) -> None:
    loss = {
        "perceptual_weight": 0.0,
        "alignment": {"teacher": "test_vit", "weights": str(tmp_path / "absent.safetensors")},
    }
    with pytest.raises(InputError, match=r"loss.alignment: .*absent.safetensors: no such file"):
        train_tokenizer(config(photographs, loss=loss), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    train_tokenizer(config(photographs), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss__adversarial": {"discriminator": {"kind": "patchgan"}}}, "starts at step 20000, but the run ends at 6"),
        ({"loss__anneal_from": 8.0}, "loss.anneal_from is 8.0 but has no effect, anneal_steps is 0"),
        (
            {
                "loss__anneal_from": 8.0,
                "loss__anneal_steps": 4,
                "model__quantizer": {"kind": "vq", "codebook_size": 16},
            },
            "loss.anneal_from is 8.0 but has no effect, vq has no temperature to anneal",
        ),
        ({}, ""),
    ],
)
def test_settings_without_effect_are_told(changes: dict[str, object], sentence: str, photographs: Path) -> None:
    found = idle_settings(config(photographs, **changes))
    assert (len(found), sentence in "".join(found)) == (int(bool(sentence)), True)
