"""softvq compare: curves where the logs have their values, and a table of their ends."""

import json
from pathlib import Path

import pytest
from PIL import Image

from softvq.commands import curves
from tests.program import Program


def make_run(folder: Path, values: list[float], **more: float) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": 10 * (i + 1), "loss": value, **more, "clock": {"time": 5.0}} for i, value in enumerate(values)]
    lines.append({"step": 10 * len(values), "samples": {"psnr": 20.0}})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    monkeypatch.chdir(tmp_path)
    return Program(capsys)


def test_curves_lie_over_one_another(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make_run(tmp_path / "one", [4.0, 2.0, 1.0]), make_run(tmp_path / "two", [3.0, 1.5], lr=0.1)
    drawn = []
    real = curves.line_chart
    monkeypatch.setattr(curves, "line_chart", lambda series, **o: drawn.append((series, o["up"])) or real(series, **o))
    done = program("compare", one, two)
    assert done.code == 0, done.err
    assert drawn == [
        ({"one": [(10, 4.0), (20, 2.0), (30, 1.0)], "two": [(10, 3.0), (20, 1.5)]}, "loss"),
        ({"one": [(30, 20.0)], "two": [(20, 20.0)]}, "psnr"),
    ]
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in done.out.splitlines()]
    assert ["last value", "one", "two"] in cells
    assert ["step", "30", "20"] in cells
    assert ["loss", "1", "1.5"] in cells
    with Image.open("compare.png") as picture:
        assert picture.height == 2 * real({"a": [(0.0, 0.0)]}, across="", up="").height
    assert program("compare", one, two).code == 2  # it is already there
    done = program("compare", one, two, "--overwrite", "--keys", "lr", "--smooth", "2")
    assert done.code == 0
    assert drawn[-1] == ({"two": [(10, 0.1), (20, 0.1)]}, "lr")


def test_curves_are_averaged_over_what_came_before_and_thinned_out() -> None:
    assert curves._smoothed([(1.0, 4.0), (2.0, 2.0), (3.0, 0.0)], 2) == [(1, 4.0), (2, 3.0), (3, 1.0)]
    long = curves._smoothed([(float(i), float(i)) for i in range(5001)], 1)
    assert len(long) <= curves.MOST_POINTS + 1
    assert (long[0], long[-1]) == ((0, 0), (5000, 5000))


def test_what_cannot_be_compared_is_told(program: Program, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", [1.0])
    (tmp_path / "new").mkdir()
    (tmp_path / "new/log.jsonl").write_text("")
    for given, said in (
        ((run, run), "the same run is named twice"),
        ((run, tmp_path / "none"), "there is no such file"),
        ((run, tmp_path / "new"), "has no figures yet"),
        ((run, "--keys", "x"), "--keys has x, expected some of loss, psnr"),
    ):
        done = program("compare", *given)
        assert done.code == 2
        assert said in done.err
