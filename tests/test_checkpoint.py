import builtins
import io
import os
import random
import resource
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from softvq.errors import InputError, RunError
from softvq.locks import folder_lock
from softvq.training import checkpoint
from softvq.training.checkpoint import latest, load, prune, recover, save, verify


def tensors(step: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(step)
    return {"model.weight": torch.randn(64, 8, generator=draws), "ema.weight": torch.randn(64, 8, generator=draws)}


def run_with(run: Path, *steps: int, keep: int = 10) -> Path:
    for step in steps:
        save(run, step, tensors(step), {"note": step}, keep)
    return run


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path, 100, tensors(1), {"seed": 7}, keep=1)
    assert saved.folder == tmp_path / "checkpoints" / "step-00000100"
    assert sorted(path.name for path in saved.folder.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]
    assert latest(tmp_path) == saved
    loaded, info = load(saved)
    assert info == {"seed": 7, "step": 100}
    assert loaded.keys() == tensors(1).keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors(1).items())


def test_others_may_read_a_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, tensors(1), {}, keep=1).folder
    mask = os.umask(0)
    os.umask(mask)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask for path in folder.iterdir())


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert recover(tmp_path, refuse) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run_with(tmp_path, 5, 30, 20, 100_000_000, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-100000000"]
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    run_with(tmp_path, 10, 20, 30)
    (tmp_path / "checkpoints/step-00000030/state.json").write_text("{}")
    prune(tmp_path, 2)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]


class Died(BaseException):
    """The process is no more: no call after this one has an effect either."""


def crash_in_save(run: Path, step: int, n: int) -> bool:
    """Save, but let the n-th call to the file system and all after it never happen; return whether there were fewer."""
    calls = 0

    def wrap(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls >= n:
                raise Died
            return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "close", "chmod"):
            patch.setattr(os, name, wrap(getattr(os, name)))
        patch.setattr(io, "open", wrap(io.open))
        patch.setattr(builtins, "open", wrap(builtins.open))
        patch.setattr(safetensors.torch, "save_file", wrap(safetensors.torch.save_file))
        try:
            save(run, step, tensors(step), {"note": step}, keep=2)
        except Died:
            return False
    return True


def test_a_crash_at_any_file_system_call_loses_nothing(tmp_path: Path) -> None:
    outcomes = []
    before = run_with(tmp_path / "before", 10, 20)
    n, finished = 0, False
    while not finished:
        n += 1
        run = Path(shutil.copytree(before, tmp_path / str(n)))
        finished = crash_in_save(run, 30, n)
        found = latest(run)
        assert found is not None
        assert found == recover(run, refuse)
        loaded, info = load(found)
        assert info == {"note": found.step, "step": found.step}
        assert all(torch.equal(loaded[name], value) for name, value in tensors(found.step).items())
        assert not any(".tmp-" in name for name in names(run))
        save(run, 40, tensors(40), {"note": 40}, keep=2)
        assert len(names(run)) == 2
        outcomes.append(found.step)
        shutil.rmtree(run)
    assert n > 20
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {20, 30}


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_every_cut_flip_and_loss_is_detected(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 10, tensors(10), {"note": 10}, keep=1).folder
    assert verify(folder) is None
    path = folder / name
    whole = path.read_bytes()
    draws = random.Random(0)
    last = len(whole) - 1
    for length in {0, last, *(draws.randrange(last) for _ in range(30))}:
        path.write_bytes(whole[:length])
        assert verify(folder) is not None, f"cut to {length} bytes"
    for _ in range(200):
        place, bit = draws.randrange(len(whole)), 1 << draws.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        assert verify(folder) is not None, f"bit {bit} of byte {place} flipped"
    path.write_bytes(whole + b"\0")
    assert verify(folder) is not None
    path.unlink()
    problem = verify(folder)
    assert problem is not None
    assert name in problem
    path.write_bytes(whole)
    assert verify(folder) is None


def test_a_checkpoint_under_another_name_is_detected(tmp_path: Path) -> None:
    folder = save(tmp_path, 10, tensors(10), {}, keep=1).folder
    assert verify(folder.rename(folder.with_name("step-00000099"))) == "state.json is of another step"


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    run_with(tmp_path, 10, 20, 30)
    damaged = tmp_path / "checkpoints" / "step-00000030"
    (damaged / "state.safetensors").write_bytes(b"")
    said: list[str] = []
    for attempt in range(2):
        found = recover(tmp_path, said.append)
        assert found is not None
        assert found.step == 20
        assert len(said) == attempt + 1
        assert "step-00000030: state.safetensors is not what was written" in said[-1]
        shutil.copytree(found.folder, damaged)  # written anew, and damaged again
        (damaged / "state.safetensors").write_bytes(b"")
    assert names(tmp_path)[2:] == ["step-00000030", "step-00000030+.corrupt", "step-00000030.corrupt"]


def test_if_all_are_damaged_the_run_stops_and_stays_stopped(tmp_path: Path) -> None:
    run_with(tmp_path, 10, 20)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(RunError, match=r"every checkpoint is damaged \(step-00000010.corrupt, step-00000020"):
            recover(tmp_path, said.append)
    assert len(said) == 2


def test_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    run_with(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError, match=r"step-00000020: the checkpoint cannot be written"):
            save(tmp_path, 20, tensors(20), {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000010"]
    assert save(tmp_path, 20, tensors(20), {}, keep=1) == latest(tmp_path)


def test_a_disk_that_will_be_too_full_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 4096))
    with pytest.raises(RunError, match="0 MiB needed, 0 MiB free"):
        save(tmp_path, 20, tensors(20), {}, keep=1)
    assert names(tmp_path) == []


def test_a_reader_never_sees_half_a_checkpoint(tmp_path: Path) -> None:
    run_with(tmp_path, 0, keep=1)
    problems: list[str] = []
    done = threading.Event()

    def read() -> None:
        step = 0
        while not done.is_set():
            found = latest(tmp_path)
            if found is None or found.step < step:
                problems.append(f"{found} after {step}")
                return
            step = found.step

    reader = threading.Thread(target=read)
    reader.start()
    try:
        run_with(tmp_path, *range(1, 41), keep=1)
    finally:
        done.set()
        reader.join()
    assert problems == []


def test_a_second_trainer_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "run", "trained"):
        message = rf"run: is being trained by process {os.getpid()} on "
        with pytest.raises(InputError, match=message), folder_lock(tmp_path / "run", "trained"):
            pass
    with folder_lock(tmp_path / "run", "trained"):
        pass


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/run: cannot be used as a folder"),
        folder_lock(tmp_path / "file/run", "trained"),
    ):
        pass


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(handle: int) -> None:
        fsync(handle)
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))

    def recorded_rename(source: Path, target: Path) -> None:
        rename(source, target)
        done.append(("rename", Path(target).name))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(tmp_path, 7, tensors(7), {}, keep=1)
    named = done.index(("rename", "step-00000007"))
    before = [name for _, name in done[:named]]
    for name in ("state.safetensors", "state.json", "manifest.json"):
        assert any(name in synced for synced in before)
    assert before[-1] == f"step-00000007.tmp-{os.getpid()}"
    assert done[named + 1] == ("fsync", "checkpoints")
