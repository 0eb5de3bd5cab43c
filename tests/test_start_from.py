"""Training that starts from a saved tokenizer, all of it or its decoder alone."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from softvq.config import from_dict, to_dict
from softvq.errors import InputError
from softvq.files import sha256
from softvq.randomness import fold_in, keys_of
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.corruption import noisy
from softvq.training.tokenizer_recipe import TokenizerRunConfig, build_task
from softvq.training.tokenizer_run import train_tokenizer
from softvq.training.tracking import read_log
from tests import family
from tests.program import make_photos

CPU = torch.device("cpu")
FROZEN = ("encoder.", "to_latents.", "quantizer.", "latent_")
CHECKPOINT = "checkpoints/step-00000006/state.safetensors"


def changed(config: TokenizerRunConfig, **changes: Any) -> TokenizerRunConfig:
    """Replace fields; `model__latent_dim=4` replaces one of a group."""
    data = to_dict(config)
    for name, value in changes.items():
        group, _, field = name.partition("__")
        (data[group] if field else data)[field or group] = value
    return from_dict(TokenizerRunConfig, data)


def save(folder: Path, name: str = "softvq") -> ImageTokenizer:
    """Save a tokenizer with weights and statistics that no recipe's seed gives."""
    torch.manual_seed(123)
    config = family.recipe(family.QUANTIZERS[name])
    tokenizer = ImageTokenizer(config.model).eval()
    tokenizer.fit_statistics([family.pictures(config, 50).images], per_channel=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def photographs(folder: Path) -> Path:
    make_photos(folder, tuple(f"{i}.png" for i in range(5)))
    return folder


def on_photographs(tmp_path: Path, **changes: Any) -> TokenizerRunConfig:
    config = family.recipe(family.SOFT, batch_size=4, steps=6, save_every=3)
    path = str(photographs(tmp_path / "photographs"))
    return changed(config, data__path=path, data__num_workers=0, start_from=str(tmp_path / "start"), **changes)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_a_head_may_be_added_and_paints_nothing_at_first(decoder_only: bool, tmp_path: Path) -> None:
    saved = save(tmp_path)
    config = changed(
        family.recipe(family.SOFT), start_from=str(tmp_path), decoder_only=decoder_only, model__head_channels=4
    )
    made = build_task(config, CPU).tokenizer.eval()
    images = family.pictures(config, 0).images
    with torch.no_grad():
        assert torch.equal(made.decode(made.encode(images)), saved.decode(saved.encode(images)))
    made.save_pretrained(tmp_path / "with")
    for other in (8, None):
        with pytest.raises(InputError, match="head_channels was 4"):
            build_task(changed(config, start_from=str(tmp_path / "with"), model__head_channels=other), CPU)


@pytest.mark.parametrize("name", sorted(family.QUANTIZERS))
@pytest.mark.parametrize("decoder_only", [False, True])
def test_every_weight_and_statistic_is_that_of_the_saved_tokenizer(
    name: str, decoder_only: bool, tmp_path: Path
) -> None:
    saved = save(tmp_path, name)
    said: list[str] = []
    config = changed(family.recipe(family.QUANTIZERS[name]), start_from=str(tmp_path), decoder_only=decoder_only)
    state = build_task(config, CPU, say=said.append).tokenizer.state_dict()
    assert said == [f"{tmp_path}: starts from its weights"]
    assert state.keys() == saved.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in saved.state_dict().items())
    anew = build_task(config, CPU, fresh=False).tokenizer.state_dict()  # what a resumed run does not read
    assert not torch.equal(anew["decoder.mask_token"], state["decoder.mask_token"])


def test_the_first_loss_is_that_of_the_saved_tokenizer(tmp_path: Path) -> None:
    saved = save(tmp_path / "start")
    config = changed(family.recipe(family.SOFT), start_from=str(tmp_path / "start"), optim__lr=1e-12)
    with torch.no_grad():
        errors = []
        for step in range(2):
            images = family.pictures(config, step).images
            errors.append(float(F.mse_loss(saved.decode_raw(saved.encode_raw(images)), images)))
    ours = family.trainer(config, tmp_path / "run")
    ours.fit(lambda start, count: family.stream(config, start, count))
    found = [line["reconstruction"] for line in read_log(tmp_path / "run/log.jsonl")]
    assert found[:2] == pytest.approx(errors, rel=1e-4)
    anew = family.trainer(changed(config, start_from=None), tmp_path / "anew").update(family.pictures(config, 0))
    assert float(anew["reconstruction"]) != pytest.approx(errors[0], rel=1e-2)
    for key, value in saved.state_dict().items():
        torch.testing.assert_close(ours.task.tokenizer.state_dict()[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"model__latent_dim": 4}, "latent_dim was 8, is 4"),
        ({"model__num_latent_tokens": 8}, "num_latent_tokens was 4, is 8"),
        ({"model__encoder": {"width": 16, "depth": 2, "num_heads": 2}}, "encoder.depth was 1, is 2"),
        ({"model__encoder": {"width": 16, "depth": 1, "num_heads": 4}}, "encoder.num_heads was 2, is 4"),
        ({"model__decoder": {"width": 32, "depth": 1, "num_heads": 2}}, "decoder.width was 16, is 32"),
        ({"model__quantizer": {**family.SOFT, "codebook_size": 8}}, "quantizer.codebook_size was 16, is 8"),
        ({"model__quantizer": {"kind": "kl"}}, "quantizer.kind was 'softvq', is 'kl'"),
        ({"model__quantizer": family.VQ}, "quantizer.kind was 'softvq', is 'vq'"),
        ({"model__quantizer": family.QUANTIZERS["residual"]}, "quantizer.kind was 'softvq', is 'residual'"),
    ],
)
def test_another_architecture_is_refused(change: dict[str, Any], differs: str, tmp_path: Path) -> None:
    save(tmp_path)
    config = changed(family.recipe(family.SOFT), start_from=str(tmp_path), **change)
    with pytest.raises(InputError, match=rf"start_from is .*, a tokenizer of another architecture .*{differs}"):
        build_task(config, CPU)


def test_the_temperature_may_change_unless_the_latents_must_stay(tmp_path: Path) -> None:
    save(tmp_path)
    warmer = {"model__quantizer": {**family.SOFT, "temperature": 1.0, "entropy_weight": 0.5}}
    config = changed(family.recipe(family.SOFT), start_from=str(tmp_path), **warmer)
    assert build_task(config, CPU).tokenizer.config.quantizer.temperature == 1.0
    with pytest.raises(InputError, match=r"\(quantizer.temperature was 0.07, is 1.0\)"):
        build_task(changed(config, decoder_only=True), CPU)


def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    config = changed(family.recipe(family.SOFT), start_from=str(tmp_path))
    with pytest.raises(InputError, match=r"is no model folder, it holds no config.json"):
        build_task(config, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": None}, "decoder_only is true, which needs start_from"),
        ({"loss__alignment": {"teacher": "test_vit"}}, "leaves nothing for loss.alignment or loss.anneal_steps"),
        ({"loss__anneal_steps": 5}, "leaves nothing for loss.alignment or loss.anneal_steps"),
        ({"corruption__mask_ratio": [0.1, 0.5]}, "decoder_only is true, which needs the latents of use"),
    ],
)
def test_a_decoder_alone_leaves_nothing_for_some_options(changes: dict[str, Any], message: str) -> None:
    settings = {"start_from": "somewhere", "decoder_only": True, **changes}
    with pytest.raises(InputError, match=message):
        changed(family.recipe(family.SOFT), **settings)


def test_a_run_of_the_decoder_alone_keeps_every_latent(tmp_path: Path) -> None:
    saved = save(tmp_path / "start")
    config = on_photographs(tmp_path, decoder_only=True)
    trained = ImageTokenizer.from_pretrained(train_tokenizer(config, tmp_path / "run"))
    before, after = saved.state_dict(), trained.state_dict()
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith(FROZEN), key
    images = family.pictures(config, 9).images
    assert torch.equal(trained.encode(images), saved.encode(images))
    assert not torch.allclose(trained.decode(saved.encode(images)), saved.decode(saved.encode(images)), atol=1e-4)
    assert trained.latent_fingerprint() == saved.latent_fingerprint()
    assert trained.fingerprint() != saved.fingerprint()
    lines = [line for line in read_log(tmp_path / "run/log.jsonl") if "loss" in line]
    assert len(lines) == 6
    assert all("entropy" not in line and line["loss"] == line["reconstruction"] for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)


def test_a_run_of_all_of_it_changes_encoder_and_statistics_too(tmp_path: Path) -> None:
    saved = save(tmp_path / "start")
    trained = ImageTokenizer.from_pretrained(train_tokenizer(on_photographs(tmp_path), tmp_path / "run"))
    after = trained.state_dict()
    same = [key for key, value in saved.state_dict().items() if torch.equal(value, after[key])]
    assert same == []


@pytest.mark.parametrize("decoder_only", [False, True])
def test_a_run_that_started_from_another_resumes_exactly_and_without_it(decoder_only: bool, tmp_path: Path) -> None:
    save(tmp_path / "start")
    config, run = on_photographs(tmp_path, decoder_only=decoder_only), tmp_path / "run"
    train_tokenizer(config, run)
    names = (CHECKPOINT, "tokenizer/model.safetensors", "tokenizer/config.json")
    before = [sha256(run / name) for name in names]
    shutil.rmtree(run / "checkpoints/step-00000006")
    shutil.rmtree(run / "tokenizer")
    shutil.rmtree(tmp_path / "start")
    train_tokenizer(config, run, resume=True)
    assert [sha256(run / name) for name in names] == before


def test_a_decoder_alone_learns_from_noisy_latents_on_request(tmp_path: Path) -> None:
    saved = save(tmp_path)
    config = changed(
        family.recipe(family.SOFT), start_from=str(tmp_path), decoder_only=True, corruption__latent_noise=0.8
    )
    task, one = build_task(config, CPU), family.pictures(config, 0)
    _, report, made = task(one, 0)
    keys = fold_in(fold_in(keys_of(config.seed, "model", one.positions), 0), 2)
    with torch.no_grad():
        latents = saved.encode_raw(one.images)
        expected = saved.decode_raw(noisy(latents, keys, 0.8))
        plain = saved.decode_raw(latents)
    torch.testing.assert_close(made[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report["reconstruction"], F.mse_loss(expected, one.images), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(made[0], plain, atol=1e-2)
    other = task(dataclasses.replace(one, positions=one.positions + 8), 1)[2][0]
    assert not torch.allclose(other, made[0], atol=1e-3)  # other noise for other positions


def test_a_decoder_alone_may_have_a_discriminator(tmp_path: Path) -> None:
    saved = save(tmp_path / "start")
    adversarial = {"discriminator": {"kind": "patchgan", "width": 4, "depth": 1}, "start": 1, "adaptive": True}
    settings = {"start_from": str(tmp_path / "start"), "decoder_only": True, "loss__adversarial": adversarial}
    ours = family.trainer(changed(family.recipe(family.SOFT), **settings), tmp_path / "run")
    judge = {key: value.clone() for key, value in ours.task.critic.discriminator.state_dict().items()}
    for step in range(3):
        report = ours.update(family.pictures(family.recipe(family.SOFT), step))
        ours.step = step + 1
        assert ("critic_loss" in report) == (step >= 1)
    assert not any(torch.equal(judge[key], value) for key, value in ours.task.critic.discriminator.state_dict().items())
    after = ours.task.tokenizer.state_dict()
    for key, value in saved.state_dict().items():
        assert torch.equal(value, after[key]) == key.startswith(FROZEN), key
