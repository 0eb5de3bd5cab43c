"""A server with too much to do, slow clients, clients that go away, strangers, and our own mistakes."""

import concurrent.futures
import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from softvq.client import Client
from softvq.errors import InputError, RunError
from softvq.serving.app import create_app
from softvq.serving.batching import Job
from softvq.serving.keys import ApiKeys, is_loopback, read_api_keys
from softvq.serving.limits import Limits
from softvq.serving.models import Models
from softvq.serving.server import listen, server_of
from tests.generators import make_generator
from tests.program import photograph, png
from tests.serving import Served, load, serving

PHOTO = png(photograph())
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("limited") / "generator"
    make_generator(made)
    return made


class Held:
    """Models that compute when they are let."""

    def __init__(self, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models, self.free, self.given, self._compute = models, threading.Event(), [], models.compute
        monkeypatch.setattr(models, "compute", self)

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        self.given.append(len(jobs))
        assert self.free.wait(30)
        return self._compute(jobs)


@pytest.fixture
def held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    found = Held(load(folder), monkeypatch)
    yield found
    found.free.set()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_beyond_the_queue_503_says_when_to_ask_again(held: Held) -> None:
    limits = Limits(queue=3, batch=2, images=1)
    with serving(held.models, limits) as served, concurrent.futures.ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(served.image, "/v1/encode", PHOTO) for _ in range(3)]
        until(lambda: served.app.inside == 3)
        for body in (PHOTO, bytes(3_000_000)):  # the second does not fit into the sockets' buffers
            refused = served.image("/v1/encode", body)
            assert refused.status == 503
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert "3 requests are waiting" in refused.error
        assert served("GET", "/healthz").status == 200  # it still tells how it is
        held.free.set()
        assert [one.result(20).status for one in accepted] == [200] * 3
        assert sum(held.given) == 3
        until(lambda: served.app.inside == 0)
        assert served.image("/v1/encode", PHOTO).status == 200


def test_the_client_asks_again_after_a_503(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        held.free.set()
        until(lambda: served.app.inside == 0)

    with serving(held.models, Limits(queue=1)) as served, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.image, "/v1/encode", PHOTO)
        until(lambda: served.app.inside == 1)
        once = Client(f"http://127.0.0.1:{served.port}", attempts=1)
        with pytest.raises(RunError, match="1 requests are waiting"):
            once.encode(PHOTO)
        with monkeypatch.context() as patched:
            patched.setattr("softvq.client.time", types.SimpleNamespace(sleep=sleep))
            assert served.client.encode(PHOTO)
        assert slept == [1.0]
        assert first.result(20).status == 200


def test_the_client_says_who_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(RunError, match=f"http://127.0.0.1:{port}: does not answer"):
        Client(f"http://127.0.0.1:{port}").models()
    with pytest.raises(InputError, match="expected one such as"):
        Client("file:///etc/passwd")
    with pytest.raises(InputError, match=r"none\.png: cannot be read"):
        Client("http://127.0.0.1:1").encode(tmp_path / "none.png")


def test_the_client_needs_no_torch() -> None:
    code = "import sys, softvq.client; sys.exit(bool({'torch', 'numpy', 'PIL', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_after_the_deadline_504_and_no_work(held: Held) -> None:
    with serving(held.models, Limits(deadline=0.1)) as served:
        late = served.image("/v1/encode", PHOTO)
        assert late.status == 504
        assert "more than 0.1 s" in late.error
        assert served.image("/v1/encode", PHOTO).status == 504  # while the first is still computed
        stream = served("POST", "/v1/generate/stream", {"labels": [0]})
        assert b"event: error" in stream.body
        held.free.set()
        assert served("GET", "/readyz").status == 200
    assert held.given == [1]  # the others were given up before their turn


def test_sampling_ends_when_nobody_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, steps = load(folder), []
    assert models.pipeline is not None
    network = models.pipeline.generator.network

    def count(module: Any, inputs: Any) -> None:
        steps.append(1)
        time.sleep(0.02)

    network.register_forward_pre_hook(count)
    with serving(models, Limits(deadline=0.2, steps=10_000)) as served:
        assert served("POST", "/v1/generate", {"labels": [0], "steps": 10_000}).status == 504
    assert len(steps) < 500  # the server has stopped, and with it the models' thread


def test_whoever_still_waits_at_the_end_is_told(held: Held) -> None:
    limits = Limits(grace=0.3, batch=1, images=1)
    app = create_app(held.models, limits)
    with listen("127.0.0.1", 0) as made, concurrent.futures.ThreadPoolExecutor(3) as pool:
        server = server_of(app, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [made]})
        thread.start()
        until(lambda: server.started)
        served = Served(made.getsockname()[1], held.models, app)
        waiting = [pool.submit(served.image, "/v1/encode", PHOTO) for _ in range(2)]  # one computed, one queued
        stream = pool.submit(served, "POST", "/v1/generate/stream", {"labels": [0]})
        until(lambda: app.inside == 3 and held.given)
        server.handle_exit(signal.SIGTERM, None)
        for one in waiting:
            refused = one.result(20)
            assert refused.status == 503
            assert "shut down" in refused.error
            assert refused.headers["retry-after"] == "1"
        assert b"event: error" in stream.result(20).body
        assert b"shut down" in stream.result(20).body
        thread.join(20)
        assert not thread.is_alive()


def test_a_preview_that_is_not_finite_is_left_out_and_lack_of_memory_is_told_as_such(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, painted = load(folder), []
    paint = models._painted

    def paints(latents: Any) -> list[Any]:
        painted.append(len(painted))
        if len(painted) == 1:
            return [RunError("not finite")] * len(latents)
        if len(painted) == 4:
            raise MemoryError
        return paint(latents)

    monkeypatch.setattr(models, "_painted", paints)
    with serving(models) as served:
        asked = {"labels": [0], "steps": 4, "previews": 2}
        body = served("POST", "/v1/generate/stream", asked).body
        assert (body.count(b"event: preview"), body.count(b"event: images"), body.count(b"event: error")) == (1, 1, 0)
        body = served("POST", "/v1/generate/stream", asked).body
        assert b"out of memory; ask for less" in body


def raw(served: Served, head: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    return connection


def test_a_client_that_goes_away_is_not_worked_for(held: Held) -> None:
    head = f"POST /v1/encode HTTP/1.1\nHost: localhost\nContent-Type: image/png\nContent-Length: {len(PHOTO)}\n"
    with serving(held.models, Limits(batch=1, images=1)) as served:
        connections = [raw(served, head, PHOTO) for _ in range(3)]
        until(lambda: served.app.inside == 3 and held.given)
        for connection in connections:
            connection.close()
        until(lambda: served.app.inside == 0)
        held.free.set()
    assert held.given == [1]


def test_a_body_that_never_comes_is_not_waited_for(held: Held) -> None:
    head = "POST /v1/encode HTTP/1.1\nHost: localhost\nContent-Type: image/png\nContent-Length: 1000\n"
    with serving(held.models, Limits(upload=0.1)) as served:
        with contextlib.closing(raw(served, head, b"abc")) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        chunked = head.replace("Content-Length: 1000", "Transfer-Encoding: chunked")
        with contextlib.closing(raw(served, chunked, b"3\r\nabc\r\n")) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert served.app.inside == 0


def test_a_body_that_does_not_tell_its_length_is_counted(held: Held) -> None:
    head = "POST /v1/encode HTTP/1.1\nHost: localhost\nContent-Type: image/png\nTransfer-Encoding: chunked\n"
    chunk = b"1000\r\n" + bytes(0x1000) + b"\r\n"
    with serving(held.models, Limits(body_bytes=10_000)) as served:
        connection = raw(served, head, 3 * chunk + b"0\r\n\r\n")
        with connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_keys(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n{KEY}\nanother-key-of-ours\n")
    path.chmod(0o600)
    keys = read_api_keys(path)
    assert [keys.accepts(key) for key in (KEY, "another-key-of-ours", KEY[:-1], KEY + "x", "", "# ours")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    with serving(load(folder), keys=keys) as served:
        for header in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}é"):
            answer = served.image("/v1/encode", PHOTO, authorization=header)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.error
        assert served("GET", "/metrics").status == served("GET", "/v1/models").status == 401
        assert served("GET", "/healthz").status == served("GET", "/readyz").status == 200
        assert served("GET", "/healthz", host="example.org").status == 200
        assert served("GET", "/openapi.json").json["components"]["securitySchemes"]
        with pytest.raises(InputError, match="an API key is needed"):
            served.client.models()
        assert Client(f"http://127.0.0.1:{served.port}", api_key=KEY).encode(PHOTO)


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("", 0o600, "holds no API key"),
        ("short\n", 0o600, "at least 16"),
        ("a key with some spaces\n", 0o600, "spaces"),
        (KEY, 0o604, "every user"),
        (KEY + "é", 0o600, "ASCII"),
        (None, 0, "cannot be read"),
    ],
)
def test_files_that_hold_no_good_keys(text: str | None, mode: int, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)
        (tmp_path / "keys").chmod(mode)
    with pytest.raises(InputError, match=words):
        read_api_keys(tmp_path / "keys")
    assert not ApiKeys(()).accepts("")


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.3.2.1", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "")))


@pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError, 500), (MemoryError, 503)])
def test_our_own_mistakes_are_told_to_the_log_alone(
    error: type[Exception], status: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = load(folder)

    def fails(jobs: Sequence[Job]) -> list[Any]:
        raise error("a secret")

    monkeypatch.setattr(models, "compute", fails)
    with caplog.at_level(logging.INFO), serving(models) as served:
        answer = served.image("/v1/encode", PHOTO)
        assert answer.status == status
        assert ("retry-after" in answer.headers) == (status == 503)
        assert "secret" not in answer.error
        stream = served("POST", "/v1/generate/stream", {"labels": [0]}).body
        assert b"event: error" in stream
        assert b"secret" not in stream
        assert served("GET", "/readyz").status == 200
    # the server has stopped by now, so every line is written
    lines = [json.loads(record.message) for record in caplog.records if record.name == "softvq.access"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/v1/encode", status), ("POST", "/v1/generate/stream", 200), ("GET", "/readyz", 200),
    ]  # fmt: skip
    assert lines[0]["request_id"] == answer.headers["x-request-id"]
    assert lines[0]["bytes_in"] == len(PHOTO)
    assert any("a secret" in str(record.exc_info) for record in caplog.records)


def test_values_that_are_not_finite_are_told_to_whom_they_concern(folder: Path) -> None:
    models = load(folder)
    models.tokenizer.latent_std.fill_(1e38)
    with serving(models) as served:
        rows = [[9.0] * models.tokenizer.config.latent_dim] * models.tokens[1]
        answer = served("POST", "/v1/decode", {"latents": rows})
        assert answer.status == 422
        assert "not finite" in answer.error
