"""Weights & Biases and trackio: what they get, and that nothing they do stops a run."""

import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from softvq.errors import InputError
from softvq.training import trackers
from softvq.training.trackers import Tracker
from softvq.training.tracking import read_log
from tests import family


class Fake(types.ModuleType):
    """Stands for either package, and remembers its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken: BaseException | None = None

    def init(self, **options: Any) -> None:
        self.calls.append(("init", options))

    def log(self, values: dict[str, float], step: int) -> None:
        self.gate.wait(30)
        if self.broken:
            raise self.broken
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture(params=trackers.TRACKERS)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    module = Fake(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: True)
    return module


def test_a_run_reports_to_it(fake: Fake, tmp_path: Path) -> None:
    config = family.recipe(family.SOFT, trackers=[fake.__name__], steps=3)
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    family.trainer(config, tmp_path).fit(lambda start, steps: family.stream(config, start, steps))
    (first, options), *logged, (last, _) = fake.calls
    assert (first, last) == ("init", "finish")
    assert options["project"] == "softvq"
    assert options["config"] == {"seed": 3}
    assert options["resume"] == "allow"
    assert options["name"].startswith(tmp_path.name)
    assert ("id" in options) == (fake.__name__ == "wandb")
    log = read_log(tmp_path / "log.jsonl")
    assert [step for _, (step, _) in logged] == [1, 2, 3]
    for (_, (_, values)), line in zip(logged, log, strict=True):
        assert values["loss"] == line["loss"]
        assert values["images_per_sec"] == line["clock"]["images_per_sec"]


@pytest.mark.parametrize("error", [OSError("no route"), SystemExit(1)])
def test_what_it_raises_costs_one_warning(error: BaseException, fake: Fake, tmp_path: Path) -> None:
    fake.broken = error
    warnings: list[str] = []
    tracker = Tracker(fake.__name__, tmp_path, warnings.append)
    tracker.write(1, {"loss": 1.0})
    tracker._thread.join(10)
    tracker.write(2, {"loss": 1.0})
    tracker.write(3, {"loss": 1.0})
    tracker.close()
    assert warnings == [f"{fake.__name__} is off from here on ({type(error).__name__}: {error}); log.jsonl goes on"]


def test_what_hangs_is_not_waited_for(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "MOST_WAITING", 2)
    fake.gate.clear()
    warnings: list[str] = []
    tracker = Tracker(fake.__name__, tmp_path, warnings.append, patience=0.05)
    for step in range(10):
        tracker.write(step, {"loss": 1.0})
    tracker.close()
    assert warnings == [f"{fake.__name__} is off from here on (it is 2 lines behind); log.jsonl goes on"]
    other = Tracker(fake.__name__, tmp_path, warnings.append, patience=0.05)
    other.write(1, {"loss": 1.0})
    other.close()
    assert warnings[1:] == [f"{fake.__name__} is off from here on (it did not end within 0.05 s); log.jsonl goes on"]
    fake.gate.set()


def test_what_is_not_installed_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    config = family.recipe(family.SOFT, trackers=["wandb"])
    with pytest.raises(InputError, match=r"wandb, which is not installed; run: pip install 'softvq\[trackers\]'"):
        family.trainer(config, tmp_path)
