"""Hostile files are refused, run nothing and take little; `benchmarks/reliability.py` has it in full."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softvq.errors import InputError
from softvq.files import read_tensors
from tests.security import campaigns, zoo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the campaigns in a process without threads, which may fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.security", str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["pickles", "safetensors", "configs", "bombs", "formats"])
def test_every_hostile_file_is_refused_within_limits(kind: str, found: dict[str, Any]) -> None:
    figures = found[kind]
    assert figures["not_refused"] == []
    assert figures["refused"] == figures["files"] >= 13
    assert figures.get("ran", 0) == 0
    assert figures["most_mebibytes"] <= 200


def test_the_limits_can_be_missed() -> None:
    """The harness notices memory, code that ran, and a read that succeeded."""
    assert campaigns.attempted(lambda: bytearray(300 << 20)).mebibytes > 250
    assert campaigns.attempted(lambda: None).code == 0
    assert campaigns.attempted(lambda: {}["a"]).code == 1


def test_the_pickles_do_run_where_somebody_opens_them(tmp_path: Path) -> None:
    import pickle

    marker = tmp_path / "marker"
    data = zoo.pickles(marker)
    for name in ("exec, protocol 2", "open, protocol 4", "nested, protocol 0"):
        marker.unlink(missing_ok=True)
        campaigns.attempted(lambda name=name: pickle.loads(data[name]))
        assert marker.exists(), name


def test_mutated_images_are_images_or_sentences() -> None:
    found = campaigns.mutated_images(300)
    assert found["read"] + found["refused"] == found["files"] == 300
    assert min(found["read"], found["refused"]) > 0


def test_mutated_safetensors_are_tensors_or_sentences(tmp_path: Path) -> None:
    found = campaigns.mutated_safetensors(tmp_path, 300)
    assert found["read"] + found["refused"] == found["files"] == 300
    assert min(found["read"], found["refused"]) > 0


def test_a_refused_pickle_says_what_to_give_instead(tmp_path: Path) -> None:
    for number, data in enumerate(zoo.pickles(tmp_path / "marker").values()):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"{re.escape(str(path))}: (is a pickle|not a whole safetensors)"):
            read_tensors(path)


def test_a_folder_of_strangers_is_not_imported_from(tmp_path: Path) -> None:
    """Modules of the names of ours, in the folder where the program is started, are left alone; so is the home."""
    for name in ("torch", "config", "yaml", "numpy", "softvq"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from here')")
    home = tmp_path / "home"
    code = "import sys; from softvq.cli import main; sys.exit(main(['version']))"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not home.exists()


def test_secrets_of_the_environment_are_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.reliability.harness import make_photographs, train

    secrets = {
        "HF_TOKEN": "hf_5ecret0fTheHub",
        "WANDB_API_KEY": "5ecret0fTheTracker",
        "AWS_SECRET_ACCESS_KEY": "5ecret",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    make_photographs(tmp_path)
    train(tmp_path, "run", steps=2, sample_every=1)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"5ecret" not in path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["../../etc", "a/../b", "/etc/passwd/x", "a/b\x00c", "a b/c", "https://x/y", "-a/b"])
def test_a_name_that_leads_elsewhere_is_no_repository(name: str) -> None:
    from softvq.tokenizers.autoencoder import ImageTokenizer

    with pytest.raises((InputError, ValueError)):
        ImageTokenizer.from_pretrained(name)


def test_nothing_in_the_package_starts_programs_or_opens_connections() -> None:
    import ast

    forbidden = {"subprocess", "urllib", "http", "requests", "ftplib", "xmlrpc", "ctypes", "code", "pty", "telnetlib"}
    for path in sorted((ROOT / "softvq").rglob("*.py")):
        # the client of a server is there to connect to the address that it is given
        unwanted = forbidden - {"http", "urllib"} if path == ROOT / "softvq/client.py" else forbidden
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & unwanted, path.name
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os":
                assert node.attr not in {"system", "popen", "execv", "execvp", "spawnv"}, path.name
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "socket":
                listens = {"socket", "getaddrinfo", "create_server", "SOCK_STREAM"}  # opens no connection of its own
                allowed = listens if path == ROOT / "softvq/serving/server.py" else {"gethostname"}
                assert node.attr in allowed, path.name
