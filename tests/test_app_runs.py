"""Runs as the app shows them, also those that strangers made."""

import json
import os
from pathlib import Path

import pytest

from softvq.app.runs import list_runs, read_picture, read_run
from softvq.errors import InputError
from softvq.training.tracking import RunLog
from tests.program import photograph


def make_run(folder: Path, steps: int = 3) -> Path:
    folder.mkdir(parents=True)
    log = RunLog(folder / "log.jsonl", 0, pytest.fail)
    for step in range(1, steps + 1):
        log.write(step, {"loss": 1 / step, "bad": float("nan"), "kind": "x"}, {"time": 1e9, "images_per_sec": 5.0})
    log.write(steps, {"samples": {"psnr": 20.0}})
    return folder


def test_runs_are_found_newest_first_with_their_state(tmp_path: Path) -> None:
    for place, name in enumerate(("old", "group/new", ".hidden")):
        run = make_run(tmp_path / name)
        os.utime(run / "log.jsonl", (place, place))
    (tmp_path / "old/status.json").write_text('{"state": "failed", "step": 2, "message": "why"}')
    (tmp_path / "group/new/status.json").write_text('{"state": "run')
    nothing = {"state": None, "step": None, "message": ""}
    assert list_runs(tmp_path) == [
        {"name": "group/new", **nothing},
        {"name": "old", "state": "failed", "step": 2, "message": "why"},
    ]
    assert [run["name"] for run in list_runs(tmp_path / "old")] == ["."]
    assert list_runs(tmp_path / "none") == []
    assert read_run(tmp_path / "old", ".")["curves"].keys() == {"loss", "samples: psnr", "clock: images_per_sec"}


def test_curves_are_those_of_the_log_and_thin_enough_to_draw(tmp_path: Path) -> None:
    make_run(tmp_path / "short")
    found = read_run(tmp_path, "short")
    assert found["curves"] == {
        "loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)],
        "clock: images_per_sec": [(1, 5.0), (2, 5.0), (3, 5.0)],
        "samples: psnr": [(3, 20.0)],
    }
    assert (found["config"], found["pictures"]) == ("", [])
    folder = tmp_path / "long"
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": step / 2, "flag": True}) for step in range(5000)]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 5000, "lo']))
    curve = read_run(tmp_path, "long")["curves"]["loss"]
    assert len(curve) == 400
    assert (curve[0], curve[-1]) == ((0, 0.0), (4999, 2499.5))
    assert all(value == step / 2 for step, value in curve)
    assert sorted(curve) == curve


def test_pictures_and_configs_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "samples").mkdir()
    for step in range(70):
        photograph(16, 16).save(run / f"samples/step-{step:03}.png")
    (run / "samples/notes.txt").write_text("no picture")
    (run / "config.yaml").write_text("a: 1\n")
    found = read_run(tmp_path, "run")
    assert found["config"] == "a: 1\n"
    assert len(found["pictures"]) == 60
    assert found["pictures"][0] == "step-069.png"
    data, media = read_picture(tmp_path, "run", "step-000.png")
    assert (data, media) == ((run / "samples/step-000.png").read_bytes(), "image/png")


def test_nothing_outside_of_the_folder_is_read(tmp_path: Path) -> None:
    root, secret = tmp_path / "runs", tmp_path / "secret"
    make_run(root / "run")
    make_run(secret)
    photograph(16, 16).save(secret / "a.png")
    (root / "run/samples").mkdir()
    (root / "run/samples/link.png").symlink_to(secret / "a.png")
    (root / "linked").symlink_to(secret)
    (root / "forged").mkdir()
    (root / "forged/log.jsonl").symlink_to(secret / "log.jsonl")
    (root / "run/config.yaml").symlink_to(secret / "log.jsonl")
    for name in ("../secret", "linked", str(secret), "run/../../secret", "forged", "run"):
        with pytest.raises(InputError, match="leads out of"):
            read_run(root, name)
    for run, picture in (("run", "link.png"), ("run", "../../../secret/a.png")):
        with pytest.raises(InputError, match="leads out of"):
            read_picture(root, run, picture)
    assert "linked" not in {run["name"] for run in list_runs(root)}
    make_run(root / "album")
    (root / "album/samples").symlink_to(secret)
    assert read_run(root, "album")["pictures"] == []


@pytest.mark.parametrize("picture", ["none.png", "../log.jsonl", "sub", "notes.txt", ""])
def test_what_is_no_picture_of_the_run_is_refused(tmp_path: Path, picture: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "samples/sub").mkdir(parents=True)
    (run / "samples/notes.txt").write_text("no picture")
    with pytest.raises(InputError, match="is no picture of the run"):
        read_picture(tmp_path, "run", picture)


@pytest.mark.parametrize("name", ["none", "", "a\0b", "run/samples", "x" * 300])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(InputError):
        read_run(tmp_path, name)


def test_a_log_of_rubbish_is_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": "x"}\n{"step": 1, "samples": [3], "clock": [1], "loss": "x"}\n'
    )
    assert read_run(tmp_path, "run")["curves"] == {}


def test_numbers_that_no_curve_can_show_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = ['{"step": 1, "loss": 0.5}', '{"step": true, "loss": 1}', f'{{"step": 2, "loss": {10**400}}}']
    lines += [f'{{"step": 3, "loss": {"[" * 100_000}']
    (tmp_path / "run/log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "run/status.json").write_text('{"step": true}')
    found = read_run(tmp_path, "run")
    assert (found["curves"], found["step"]) == ({"loss": [(1, 0.5)]}, None)


def test_one_odd_folder_hides_no_other_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/log.jsonl").symlink_to(tmp_path / "nowhere")
    odd = os.fsencode(tmp_path / "run/samples") + b"/\xff.png"
    (tmp_path / "run/samples").mkdir()
    try:
        Path(os.fsdecode(odd)).touch()
        make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))
    except OSError:
        pytest.skip("this file system has names of text alone")
    assert [run["name"] for run in list_runs(tmp_path)] == ["run"]
    assert read_run(tmp_path, "run")["pictures"] == []


def test_a_picture_whose_name_no_file_can_have_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(InputError):
        read_picture(tmp_path, "run", f"{'x' * 300}.png")
