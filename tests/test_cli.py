import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch

from softvq import __version__, cli
from softvq.cli import main
from softvq.errors import InputError, Interrupted, RunError
from tests.program import Program

COMMANDS = [
    ["encode"],
    ["decode"],
    ["reconstruct"],
    ["train"],
    ["cache-latents"],
    ["train", "tokenizer"],
    ["train", "generator"],
    ["sample"],
    ["evaluate"],
    ["evaluate", "probe"],
    ["evaluate", "latents"],
    ["app"],
    ["inspect"],
    ["fit-stats"],
    ["average"],
    ["doctor"],
    ["demo"],
    ["version"],
]


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def in_new_process(code: str, stdout: IO[bytes] | int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["version"], ["encode", "--help"]])
def test_answers_that_need_no_torch_do_not_import_it(arguments: list[str]) -> None:
    code = f"""
import sys
from softvq.cli import main
assert main({arguments}) == 0
heavy = {{"torch", "numpy", "PIL", "timm", "torchvision", "rich", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    process = in_new_process(code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"softvq" in out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(program: Program, command: list[str]) -> None:
    result = program(*command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: softvq {' '.join(command)} ")


def test_help_names_every_command_and_exit_code(program: Program) -> None:
    out = program("--help").out
    assert all(f"    {command[0]}" in out for command in COMMANDS)
    assert all(f"{code} " in out.partition("exit codes:")[2] for code in (0, 2, 3, 75))


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_version(program: Program, arguments: list[str]) -> None:
    result = program(*arguments)
    assert (result.code, result.out) == (0, f"softvq {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["COMMAND", "softvq --help"]),
        (["enkode"], ["'enkode'", "softvq --help"]),
        (["encode", "model"], ["PHOTO|DIR, OUT", "softvq encode --help"]),
        (["encode", "model", "photo", "out", "--batch-size", "0"], ["--batch-size", "'0'", "at least 1"]),
        (["encode", "model", "photo", "out", "--batch", "2"], ["'--batch'"]),
        (["encode", "model", "photo", "out", "more"], ["'more'"]),
        (["train", "tokenizer"], ["--config", "softvq train tokenizer --help"]),
        (["train", "tokenizer", "--config", "x", "--steps", "3"], ["'--steps'"]),
    ],
)
def test_a_wrong_command_line_is_one_sentence(program: Program, arguments: list[str], names: list[str]) -> None:
    program.refuses(*arguments, names=tuple(names))


def test_overrides_may_stand_anywhere(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "_command", lambda name: seen.append)
    assert program("train", "tokenizer", "a=1", "--config", "x", "b.c=2", "--resume", "d=3", "e=").code == 0
    assert sorted(seen[0].overrides) == ["a=1", "b.c=2", "d=3", "e="]


USED = "softvq: aa: cannot be used (Too long)"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("x.png: is empty"), 2, "softvq: x.png: is empty\n"),
        (RunError("the disk is full"), 3, "softvq: the disk is full\n"),
        (Interrupted("stopped at step 3"), 75, "softvq: stopped at step 3\n"),
        (KeyboardInterrupt(), 130, "softvq: stopped by the keyboard\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 3, "softvq: a/b: No space left on device\n"),
        (OSError(errno.ENAMETOOLONG, "Too long", "aa"), 2, f"{USED}; check the name and its permissions\n"),
        (OSError(errno.EIO, "Input/output error"), 3, "softvq: Input/output error\n"),
        (InputError("a\nb\x1b[31m\tc"), 2, "softvq: a b [31m c\n"),
    ],
)
def test_every_error_has_its_exit_code_and_sentence(
    program: Program, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr(cli, "_command", fails_with(error))
    result = program("doctor")
    assert (result.code, result.out, result.err) == (code, "", message)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_names_the_remedy(
    program: Program, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(cli, "_command", fails_with(error))
    program.refuses("doctor", code=3, names=("out of memory", "--batch-size", "--size"))


def test_a_mistake_of_ours_asks_for_a_report(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_command", fails_with(ZeroDivisionError("division by zero")))
    program.refuses("doctor", code=1, names=("ZeroDivisionError: division by zero", "report", "--debug"))


def test_debug_shows_where_it_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_command", fails_with(InputError("no")))
    with pytest.raises(InputError, match="no"):
        main(["doctor", "--debug"])


def test_a_reader_that_goes_away_ends_the_program_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    process = in_new_process("import sys; from softvq.cli import main; sys.exit(main(['version']))", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_under_stdout_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        process = in_new_process("import sys; from softvq.cli import main; sys.exit(main(['version']))", stdout=full)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err == b"softvq: No space left on device\n"


def fails_with(error: BaseException) -> Callable[[str], Callable[[object], None]]:
    def command(arguments: object) -> None:
        raise error

    return lambda name: command
