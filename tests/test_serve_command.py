"""`softvq serve` as it is typed: what it refuses, and how it ends."""

import concurrent.futures
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from softvq.client import Client
from tests.generators import make_generator
from tests.program import Program, make_model


def test_what_it_refuses(program: Program, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    given = ("serve", "--tokenizer", tmp_path / "model")
    program.refuses(*given, "--host", "0.0.0.0", names=("--host is 0.0.0.0", "--api-key-file", "--insecure"))
    program.refuses(*given, "--api-key-file", tmp_path / "none", names=("none: cannot be read",))
    program.refuses(*given, "--deadline", "0", names=("deadline is 0",))
    program.refuses("serve", "--tokenizer", tmp_path / "none", "--port", "0", names=("none: no such folder",))
    make_generator(tmp_path / "other", num_tokens=8)
    program.refuses(*given, "--port", "0", "--generator", tmp_path / "other", names=("has 4 tokens of 8",))
    make_generator(tmp_path / "long")
    long = ("--generator", tmp_path / "long", "--port", "0", "--max-steps", "2")
    program.refuses(*given, *long, names=("--max-steps is 2", "takes 3"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program.refuses(*given, "--port", port, names=(f"port {port}", "Address already in use"))


def test_a_missing_package_is_named(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softvq.commands.serve.NEEDED", ("fastapi", "no_such_package"))
    program.refuses("serve", "--tokenizer", "x", names=("no_such_package", "pip install 'softvq[serve]'"))


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def test_a_signal_ends_it_after_its_work(tmp_path: Path) -> None:
    make_generator(tmp_path / "generator")
    tokenizer = tmp_path / "generator/tokenizer"
    command = [sys.executable, "-m", "softvq", "serve", "--tokenizer", tokenizer, "--generator", tmp_path / "generator"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*command, "--port", "0", "--max-steps", "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        address = process.stdout.readline().split(" at ")[1].split()[0]
        client = Client(address, timeout=60.0)
        size = client.models()["tokenizer"]["image_size"]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(client.generate, [0], [seed], steps=300 + seed) for seed in range(2)]  # two batches
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            for one in asked:
                with Image.open(io.BytesIO(one.result()[0])) as image:
                    assert image.size == (size, size)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert out == "softvq has stopped\n"
    assert [line.count('"status": 200') for line in err.splitlines()] == [1, 1, 1]
