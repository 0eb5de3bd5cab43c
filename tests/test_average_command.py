import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softvq import hub
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training import checkpoint
from softvq.training.averages import save_snapshot
from tests.program import Program, contents, make_model

LENGTHS = (0.05, 0.1)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def finished_run(run: Path) -> dict[str, Tensor]:
    """Make what a run of a tokenizer leaves behind, with averages in which every weight is moved; return those."""
    tokenizer = make_model(run / "tokenizer")
    trained = {name: p.detach() for name, p in tokenizer.named_parameters() if not name.startswith("decoder.")}
    for step in (10, 20):
        tensors = {f"tokenizer.{name}": value + 0.01 * step for name, value in trained.items()}
        save_snapshot(run, step, {length: {**tensors, "head.weight": torch.ones(2)} for length in LENGTHS})
    return {name: value + 0.2 for name, value in trained.items()}


def test_a_run_is_saved_with_another_average(program: Program, tmp_path: Path) -> None:
    expected = finished_run(tmp_path / "run")
    (tmp_path / "run/tokenizer/more").mkdir()
    (tmp_path / "run/tokenizer/more/notes.txt").write_text("kept")
    before = contents(tmp_path / "run")
    result = program("average", tmp_path / "run", "--length", "0.1", "--out", tmp_path / "out")
    assert result.code == 0, result
    assert f"{tmp_path / 'out'}: the average of length 0.1 at step 20, from 2 snapshots" in result.out
    assert "fit-stats" in result.err
    ours, run = (ImageTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tmp_path / "run/tokenizer"))
    for name, value in run.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected.get(name, value), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "out/more/notes.txt").read_text() == "kept"
    assert contents(tmp_path / "run") == before
    again = ("average", tmp_path / "run", "--length", "0.05", "--out", tmp_path / "out")
    program.refuses(*again, names=(tmp_path / "out", "--overwrite"))
    assert program(*again, "--overwrite").code == 0


def test_a_generator_is_saved_whole(program: Program, tmp_path: Path) -> None:
    config = {"model": {"a": 1}, "sampling": {"ema": "0.9999", "steps": 50}}
    weights = {"blocks.weight": torch.randn(3, 2), "table": torch.arange(3.0)}
    hub.save_folder(tmp_path / "run/generator", kind="generator", config=config, tensors=weights, card="card\n")
    make_model(tmp_path / "run/generator/tokenizer")
    save_snapshot(tmp_path / "run", 7, {0.1: {"blocks.weight": torch.ones(3, 2)}})
    result = program("average", tmp_path / "run", "--length", "0.2", "--out", tmp_path / "out")
    assert result.code == 0, result
    assert "that is far" in result.err
    found, tensors, _ = hub.load_folder(tmp_path / "out", kind="generator")
    assert found == {"model": {"a": 1}, "sampling": {"ema": "power_0.2", "steps": 50}}
    torch.testing.assert_close(tensors, {"blocks.weight": torch.ones(3, 2), "table": torch.arange(3.0)})
    assert contents(tmp_path / "out/tokenizer") == contents(tmp_path / "run/generator/tokenizer")
    assert (tmp_path / "out/README.md").read_text() == "card\n"


def test_what_cannot_be_averaged_is_one_sentence(program: Program, tmp_path: Path) -> None:
    run, out = tmp_path / "run", ("--out", tmp_path / "out")
    program.refuses("average", run, "--length", "0.1", *out, names=(run, "no such folder"))
    run.mkdir()
    program.refuses("average", run, "--length", "0.1", *out, names=(run, "generator/ or tokenizer/"))
    make_model(run / "tokenizer")
    program.refuses("average", run, "--length", "0.1", *out, names=(run, "ema_lengths"))
    program.refuses("average", run, "--length", "0.3", *out, names=("--length is 0.3", "0.001 to 0.288"))
    program.refuses("average", run, "--length", "long", *out, names=("--length", "'long'"))
    program.refuses("average", run, *out, names=("--length",))
    for inside in (run, run / "tokenizer", run / "tokenizer/new"):
        program.refuses("average", run, "--length", "0.1", "--out", inside, "--overwrite", names=("the run's own",))
    save_snapshot(run, 5, {0.1: {"tokenizer.encoder.unknown": torch.ones(1)}})
    program.refuses("average", run, "--length", "0.1", *out, names=("(encoder.unknown)",))
    save_snapshot(run, 5, {0.1: {"other.weight": torch.ones(1)}})
    program.refuses("average", run, "--length", "0.1", *out, names=("(other.weight)",))
    (run / "averages/step-00000005.safetensors").write_text(json.dumps({}))
    program.refuses("average", run, "--length", "0.1", *out, names=("step-00000005.safetensors", "not a whole"))
    assert not (tmp_path / "out").exists()


def test_an_average_of_another_decay_is_saved(program: Program, tmp_path: Path) -> None:
    expected, run = finished_run(tmp_path / "run"), tmp_path / "run"
    tensors = {f"averages.ema_0.9.tokenizer.{name}": value for name, value in expected.items()}
    checkpoint.save(run, 20, tensors, {}, keep=1)
    result = program("average", run, "--decay", "0.9", "--out", tmp_path / "out")
    assert result.code == 0, result
    assert f"{tmp_path / 'out'}: the average of decay 0.9 at step 20" in result.out
    saved = ImageTokenizer.from_pretrained(tmp_path / "out").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value)
    other = ("--out", tmp_path / "other")
    program.refuses("average", run, "--decay", "0.5", *other, names=(run, "keeps no average of decay 0.5"))
    program.refuses("average", run, *other, names=("--length", "--decay"))
    program.refuses("average", run, "--decay", "0.9", "--length", "0.1", *other, names=("--length",))
    assert not (tmp_path / "other").exists()
