"""Checkpoints against crashes, damage, bad disks and lost power; `benchmarks/reliability.py` has it in full."""

import stat
from pathlib import Path

import pytest

from softvq.training import checkpoint
from tests.reliability import disk, power
from tests.test_trainer import lines, points, trainer


def test_a_crash_before_any_call_to_the_file_system_loses_nothing(tmp_path: Path) -> None:
    found = disk.crashes(tmp_path)
    assert found["places"] > 20
    assert found["survived"] == found["places"]
    assert found["never_back_and_forth"]


def test_a_disk_that_fails_once_loses_nothing(tmp_path: Path) -> None:
    found = disk.flaky_disk(tmp_path)
    assert found["places"] > 20
    assert found["survived"] == found["places"]


def test_losing_power_loses_nothing(tmp_path: Path) -> None:
    found = power.power_losses(tmp_path, 120)
    assert found["survived"] == found["states"] == 120
    assert 0 < found["with_the_new_one"] < 120


def test_what_is_not_flushed_before_it_gets_its_name_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The campaign can fail: without flushing, some states are lost."""
    monkeypatch.setattr("softvq.files._fsync", lambda path: None)
    monkeypatch.setattr("softvq.files.fsync_folder", lambda path: None)
    monkeypatch.setattr(checkpoint, "fsync_folder", lambda path: None)
    calls = power.recorded_save(disk.run_with(tmp_path / "run", 10, 20), 30, keep=2)
    assert not any(call.kind in ("data", "names") for call in calls)
    lost = list(power.states(calls, {}, 50, __import__("random").Random(0)))
    assert any(b"\0" in (data or b"") for disk in lost for data in disk.values())


def test_every_changed_byte_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    found = disk.corruptions(tmp_path, 100)
    assert found["detected"] == found["fell_back"] == found["changed"] == 100


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    found = disk.cuts(tmp_path, 10)
    assert found["detected"] == found["cut"] == 36


def test_a_full_disk_keeps_the_last(tmp_path: Path) -> None:
    assert disk.full_disk(tmp_path, 10) == {"full": 10, "survived": 10}


def test_saving_leaves_nothing_open(tmp_path: Path) -> None:
    found = disk.leaks(tmp_path, 30)
    assert (found["handles"], found["threads"], found["folders"]) == (0, 0, 2)


def test_pruning_never_deletes_the_newest_intact_one(tmp_path: Path) -> None:
    """Whatever is damaged, whatever is kept: the newest that verifies stays, and `keep` of those there are."""
    for damaged in range(16):
        run = disk.run_with(tmp_path / str(damaged), 10, 20, 30, 40)
        for place in range(4):
            if damaged >> place & 1:
                (run / f"checkpoints/step-{10 * place + 10:08d}/manifest.json").write_text("{}")
        before = checkpoint.latest(run)
        for keep in (3, 2, 1):
            checkpoint.prune(run, keep)
            assert checkpoint.latest(run) == before
            intact = [path for path in (run / "checkpoints").iterdir() if checkpoint.verify(path) is None]
            assert len(intact) == min(keep, 4 - damaged.bit_count())


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, score in ((10, 1.0), (20, 3.0), (30, 2.0), (40, None)):
        info = {} if score is None else {"score": score}
        checkpoint.save(tmp_path, step, disk.tensors(step), info, keep=1)
    folders = tmp_path / "checkpoints"
    assert sorted(path.name[-2:] for path in folders.iterdir()) == ["20", "40"]
    (folders / "step-00000020/state.safetensors").write_bytes(b"")  # the best is damaged: it does not count
    checkpoint.save(tmp_path, 50, disk.tensors(50), {"score": 0.5}, keep=1)
    assert sorted(path.name[-2:] for path in folders.iterdir()) == ["50"]


@pytest.mark.parametrize("name", ["loss", "psnr"])
def test_a_run_keeps_the_best_that_its_log_knows(tmp_path: Path, name: str) -> None:
    def sample(step: int) -> dict[str, float]:
        return {"psnr": {5: 1.0, 10: 9.0, 15: 2.0, 20: 3.0}[step]}

    trainer(tmp_path, sample=sample, sample_every=5, keep=1, keep_best=name).fit(points)
    losses = {line["step"]: line["loss"] for line in lines(tmp_path) if "loss" in line}
    best = 10 if name == "psnr" else min((5, 10, 15, 20), key=lambda step: losses[step])
    kept = {int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 20}


def test_the_newest_regular_one_outlives_those_that_signals_left(tmp_path: Path) -> None:
    run = disk.run_with(tmp_path / "run", 10, 20, 21, 22, 23)
    checkpoint.prune(run, 1, every=10)
    assert sorted(path.name[-2:] for path in (run / "checkpoints").iterdir()) == ["20", "23"]
    checkpoint.discard_after(run, 20)
    assert sorted(path.name[-2:] for path in (run / "checkpoints").iterdir()) == ["20"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    from softvq.files import remove_leftovers, replacing

    kept = [".hidden.tmp", "a.tmp.png", ".a.12345678.png", ".lock"]
    for name in kept:
        (tmp_path / name).write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *args, **options: None)  # as if killed before
        with pytest.raises(KeyError), replacing(tmp_path / "samples" / "a.png"):
            raise KeyError
    assert len(list((tmp_path / "samples").iterdir())) == 1
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert stat.S_ISDIR((tmp_path / "samples").stat().st_mode)
