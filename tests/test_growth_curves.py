"""Curves of time and memory: what is timed, what stands beside it, and one picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import curves
from softvq.arguments.speed import STANDARD
from softvq.generators.generator import LatentGenerator
from softvq.generators.presets import generator_preset


@pytest.mark.parametrize("tiny", [True, False])
def test_every_line_is_one_that_softvq_bench_knows(tiny: bool) -> None:
    found = curves.curves(tiny)
    assert [curve.name for curve in found] == ["tokens", "batch", "model", "encode", "decode"]
    options = {word for lines in STANDARD.values() for line in lines for word in line.split() if word.startswith("--")}
    for curve in found:
        assert list(curve.places) == sorted(curve.places)
        for line in curve.places.values():
            words = line.split()
            assert words[0] in ("sample", "encode", "decode")
            assert {word for word in words if word.startswith("--")} <= options


def test_weights_are_those_of_the_network_alone() -> None:
    network = LatentGenerator(generator_preset("sit-s", num_tokens=16, latent_dim=32))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert curves.weight_bytes("sample --generator sit-s --tokens 16 --dim 32", 2) == 2 * count


def report(seconds: float, memory: int) -> str:
    row = {
        "job": "step", "model": "sit-s, 16 tokens", "batch": 1, "seconds": seconds, "low": seconds * 0.9,
        "high": seconds * 1.1, "images_per_sec": 1.0, "flops": 2_000_000_000, "memory": memory, "precision": "float32",
        "compiled": False, "note": "",
    }  # fmt: skip
    about = {"machine": "a machine", "torch": "2", "softvq": "0", "peak_flops": 1e12, "copy_bytes": 1e9}
    return json.dumps({**about, "rows": [row]})


def test_what_is_there_is_drawn_without_measuring_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(curves, "softvq", lambda arguments: called.append(arguments) or 3)
    for place in (1, 2):
        (tmp_path / f"batch-{place}.json").write_text(report(0.01 * place, 0))
    assert curves.main([str(tmp_path), "--tiny", "--only", "batch"]) == 0
    assert called == []
    with Image.open(tmp_path / "batch-time.png") as picture:
        assert picture.size == (960, 480)
    assert not (tmp_path / "batch-memory.png").exists()  # it was not known
    (tmp_path / "batch-2.json").unlink()
    assert curves.main([str(tmp_path), "--tiny", "--only", "batch"]) == 3
    assert called[0][:2] == ["bench", "sample"]
    assert called[0][-2:] == ["--out", str(tmp_path / "batch-2.json")]


def test_lines_are_what_was_measured_and_what_arithmetic_says(tmp_path: Path) -> None:
    tokens = curves.curves(tiny=True)[0]
    (tmp_path / "one.json").write_text(report(0.02, 3 << 30))
    found = curves.series(
        tokens, {16: curves.from_dict(curves.BenchReport, json.loads((tmp_path / "one.json").read_text()), "one")}
    )
    (measured,), (floor,) = found["time"]["measured"], found["time"]["matrix products alone"]
    assert (measured.x, measured.y, measured.half) == (16, pytest.approx(20), pytest.approx(2))
    assert floor.y == pytest.approx(2.0)  # 2e9 operations at 1e12 a second
    assert found["memory"]["measured"][0].y == pytest.approx(3)
    expected = curves.weight_bytes("sample --generator sit-s --tokens 16 --dim 32", 4) / 2**30
    assert found["memory"]["weights alone"][0].y == pytest.approx(expected)
