"""Whole runs that are killed, stopped and restarted, in short; `benchmarks/reliability.py` has it in full.

The campaigns run in a process of its own, which imports everything once and forks a trainer for every trial.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softvq.errors import RunError
from softvq.training import tokenizer_run
from tests.reliability.harness import make_photographs, run_config

KILLS, STOPS = 6, 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TZ": "Asia/Kathmandu", "LC_ALL": "C"}
    folder = tmp_path_factory.mktemp("ein Verzeichnis für Läufe")
    command = [sys.executable, "-m", "tests.reliability", str(folder), str(KILLS), str(STOPS)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(360)
def test_killed_runs_end_as_the_one_that_was_not(found: dict[str, Any]) -> None:
    kills = found["kills"]
    assert kills["mismatches"] == []
    assert kills["kills"] == KILLS
    assert kills["kills_in_saves"] >= 1
    assert kills["resumed_in_the_middle"] >= 2


@pytest.mark.slow
def test_terminated_runs_save_and_end_as_the_one_that_was_not(found: dict[str, Any]) -> None:
    stops = found["terminations"]
    assert stops["sent"] == stops["identical"] == STOPS
    assert stops["saved_and_75"] + stops["outside_of_training"] == STOPS


@pytest.mark.slow
def test_every_signal_at_every_moment_has_its_exit_code(found: dict[str, Any]) -> None:
    assert found["signals"] == {"cases": 9, "right": 9, "wrong": []}


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_nothing_is_different(found: dict[str, Any]) -> None:
    elastic = found["elastic"]
    assert elastic["codes"][0] == [[0, 0]]
    assert elastic["codes"][1] == [[3, -9], [0, 0]]  # the one that is left says so and ends
    assert elastic["identical"]
    assert elastic["apart_from_one_process"] < 1e-5


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_as_one_and_learns_the_same(found: dict[str, Any]) -> None:
    assert 0 < found["independence"]["2>1"] <= 1e-5


@pytest.mark.slow
def test_a_rank_may_be_slow_and_is_named_when_it_is_stuck(found: dict[str, Any]) -> None:
    stuck = found["stuck"]
    assert stuck["steps"] == [1, 2, 3]  # the second was slow
    assert stuck["code"] == 3
    assert "process 0 of 0 to 1 ended, or did not answer for 0:00:04 and is stuck" in stuck["said"]


@pytest.mark.slow
def test_a_run_that_lacks_memory_goes_on_in_smaller_parts_as_it_is_told(found: dict[str, Any]) -> None:
    memory = found["memory"]
    assert memory["codes"] == [3, 3, 0]
    assert all("raise train.accumulate and resume" in said for said in memory["said"])
    assert memory["apart"] <= 1e-6


def test_a_folder_that_vanishes_is_one_sentence(tmp_path: Path) -> None:
    make_photographs(tmp_path)
    original = tokenizer_run.batches

    def vanishing(*args: Any) -> Any:
        for place, batch in enumerate(original(*args)):
            if place == 7:
                shutil.rmtree(tmp_path / "run")
                (tmp_path / "run").write_text("in the way")
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_run, "batches", vanishing)
        with pytest.raises(RunError, match=r"step-00000024: the checkpoint cannot be written \(Not a directory\)"):
            tokenizer_run.train_tokenizer(run_config(tmp_path), tmp_path / "run")
