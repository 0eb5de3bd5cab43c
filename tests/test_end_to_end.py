"""The ratio of few tokens to a grid of latents, and what it is made of."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from benchmarks import end_to_end
from softvq.commands.bench_jobs import Row

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results" / "h200").glob("*.json"))


def row(job: str, model: str, batch: int, seconds: float, *, compiled: bool = True, precision: str = "bf16") -> Row:
    known = {"low": seconds, "high": seconds, "images_per_sec": 0.0, "flops": None, "memory": 0}
    return Row(job=job, model=model, batch=batch, seconds=seconds, precision=precision, compiled=compiled, **known)


def test_a_ratio_is_the_product_of_tokens_kernels_and_evaluations() -> None:
    rows = [
        row("step", "sit-xl, 32 tokens", 4, 0.4),
        row("decode", "softvq-l-32", 2, 1.0),
        row("step", "sit-xl, 256 tokens", 2, 1.4),
        row("step", "sit-xl, 256 tokens", 2, 4.2, compiled=False),
        row("step", "sit-xl, 1024 tokens", 2, 9.0),  # nothing stands against it
    ]
    (found,) = end_to_end.ratios(rows, 10, 2)
    assert (found.size, found.few, found.precision) == ("256 px", "sit-xl, 32 tokens", "bf16")
    few, fewer, grid, plain = 10 * 0.1 + 0.5, 2 * 0.1 + 0.5, 10 * 0.7, 10 * 2.1
    assert found.images_per_sec == pytest.approx(1 / few)
    assert found.tokens == pytest.approx(grid / few)
    assert found.kernels == pytest.approx(plain / grid)
    assert found.evaluations == pytest.approx(few / fewer)
    assert found.equal_steps == pytest.approx(plain / few)
    assert found.all == pytest.approx(plain / fewer)
    table = end_to_end.markdown([found], 10, 2).splitlines()
    assert len(table) == 3
    assert table[0].count("|") == table[1].count("|") == table[2].count("|")
    assert f"| {plain / fewer:.3g}x |" in table[2]
    (without,) = end_to_end.ratios([each for each in rows if each.compiled], 10, 2)
    assert (without.kernels, without.all) == (None, None)
    assert end_to_end.ratios([dataclasses.replace(each, precision="fp8") for each in rows[:2]], 10, 2) == []


def test_files_of_one_machine_are_put_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *map(str, RESULTS)])
    assert end_to_end.main() == 0
    said = capsys.readouterr().out
    assert "NVIDIA H200" in said
    assert "| 512 px | sit-xl, 64 tokens | sit-xl, 1024 tokens | fp8 |" in said
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(RESULTS[0].read_text()), "machine": "another"}))
    for files, why in (([RESULTS[0], other], "2 machines"), ([other], "no file has both"), ([tmp_path], str(tmp_path))):
        monkeypatch.setattr(sys, "argv", ["end_to_end.py", *map(str, files)])
        assert end_to_end.main() == 2
        assert why in capsys.readouterr().err
