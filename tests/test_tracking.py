import json
import math
import resource
import sys
from pathlib import Path

import pytest
from rich.console import Console

from softvq.errors import Interrupted, RunError
from softvq.training.tracking import Display, RunLog, TensorBoard, read_log, run_status


def refuse(text: str) -> None:
    raise AssertionError(text)


def log_of(path: Path, *steps: int) -> bytes:
    log = RunLog(path, 0, refuse)
    for step in steps:
        log.write(step, {"loss": 1 / (step + 1)})
    return path.read_bytes()


def test_numbers_are_stored_exactly_and_the_clock_apart(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", 0, refuse)
    loss = 0.1 + 2**-54
    log.write(3, {"loss": loss, "skipped": ["a.jpg"]}, clock={"images_per_sec": 12.5})
    log.sync()
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 3, "loss": loss, "skipped": ["a.jpg"], "clock": {"images_per_sec": 12.5}}
    ]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", 0, refuse)
    log.write(1, {"loss": math.nan, "samples": {"psnr": math.inf}})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": None, "samples": {"psnr": None}}


def test_lines_beyond_the_checkpoint_are_cut_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = log_of(path, 1, 2, 3, 4)
    log = RunLog(path, 2, refuse)
    assert [record["step"] for record in read_log(path)] == [1, 2]
    for step in (3, 4):
        log.write(step, {"loss": 1 / (step + 1)})
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", range(1, 24, 3))
def test_half_a_line_is_passed_over_and_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    whole = log_of(path, 1, 2)
    path.write_bytes(whole[:-cut])
    assert [record["step"] for record in read_log(path)] == [1]
    log = RunLog(path, 2, refuse)
    log.write(2, {"loss": 1 / 3})
    assert path.read_bytes() == whole


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []


def test_lines_that_find_no_room_are_written_later(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "log.jsonl"
    expected = log_of(tmp_path / "other.jsonl", *range(20))
    log = RunLog(path, 0, said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for step in range(19):
            log.write(step, {"loss": 1 / (step + 1)})
        with pytest.raises(RunError, match=r"log.jsonl: lacks lines that cannot be written"):
            log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (File too large)" in said[0]
    log.sync()
    log.write(19, {"loss": 1 / 20})
    assert path.read_bytes() == expected
    path.unlink()
    log.write(20, {})
    assert read_log(path)[0]["step"] == 20


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path, 0, refuse)
    board.write(1, {"loss": 0.5, "skipped": ["a"]})
    board.write(2, {"loss": 0.25})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_without_tensorboard_there_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    board = TensorBoard(tmp_path, 0, said.append)
    board.write(1, {"loss": 0.5})
    board.close()
    assert len(said) == 1
    assert "TensorBoard is off" in said[0]


def test_a_tensorboard_that_breaks_is_left_alone(tmp_path: Path) -> None:
    said: list[str] = []
    board = TensorBoard(tmp_path, 0, said.append)

    class Broken:
        def add_scalar(self, *args: object) -> None:
            raise ConnectionError("gone")

    board._writer.close()
    board._writer = Broken()
    for step in range(3):
        board.write(step, {"loss": 0.5})
    board.close()
    assert said == ["TensorBoard is off from here on (ConnectionError: gone); log.jsonl goes on"]


def test_off_a_terminal_there_is_one_plain_line_a_report(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as file:
        display = Display(Console(file=file, width=40), 0, 200)
        with display.live():
            display.advance(100)
            display.report(100, {"loss": 0.123456, "lr": 1e-4}, 512.34, 3725.0)
        file.seek(0)
        assert file.read() == "step 100/200  loss 0.1235  lr 0.0001  512.3 images/s  1:02:05 left\n"


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as file:
        console = Console(file=file, width=100, force_terminal=True)
        display = Display(console, 50, 200)
        with display.live():
            display.advance(100)
            display.report(100, {"loss": 0.5}, 512.0, 60.0)
        file.seek(0)
        text = file.read()
    assert "100/200" in text
    assert "loss 0.5" in text
    assert "step 100/200" not in text


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "finished"),
        (Interrupted("by SIGTERM"), "interrupted"),
        (RunError("full"), "failed"),
        (KeyError(), "failed"),
    ],
)
def test_status_says_how_a_run_ended(tmp_path: Path, error: Exception | None, state: str) -> None:
    def body() -> None:
        with run_status(tmp_path, lambda: 7, refuse):
            assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            body()
    else:
        body()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == (state, 7)
    assert status["message"] == (str(error) or "KeyError" if error else "")


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with run_status(tmp_path / "file", lambda: 0, said.append):
        pass
    assert len(said) == 2
