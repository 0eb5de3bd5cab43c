"""The app over HTTP: who is answered, what is refused with a sentence, and that nothing is left running."""

import http.client
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from softvq.app import asking, server
from softvq.app.guard import HEADERS, refusal
from softvq.app.studio import Studio
from softvq.errors import InputError
from softvq.serving.server import listen
from tests.app import asked, served, studio_in
from tests.program import TOKENS, Program, photograph, png


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return studio_in(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def port(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    root = tmp_path_factory.mktemp("runs")
    (root / "one").mkdir()
    (root / "one/log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (root / "one/samples").mkdir()
    (root / "one/status.json").write_text('{"message": "half a \\ud83d"}')
    photograph().save(root / "one/samples/step-1.png")
    with served(studio, root) as port:
        yield port


def test_every_answer_is_guarded_and_the_page_names_no_other_place(port: int) -> None:
    for path in ("/", "/page/app.css", "/page/main.js", "/api/about", "/api/nothing"):
        _, _, headers = asked(port, path)
        assert HEADERS.items() <= headers.items()
        assert "server" not in headers
    for path in sorted((server.PAGE).iterdir()):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path.name
        assert "innerHTML" not in text, path.name  # names of files and classes are text, whoever wrote them


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": "evil.example:7860"}, {"Host": "127.0.0.1.evil.example"}, {"Host": ""},
     {"Host": "localhost.evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
     {"Origin": "http://127.0.0.1:1"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}],
)  # fmt: skip
def test_other_sites_cannot_drive_it(port: int, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/api/about"), ("POST", "/api/edit"), ("POST", "/api/photographs?name=a")):
        status, found, _ = asked(port, path, method, b"{}" if method == "POST" else None, **headers)
        assert status == 403
        assert "open the address that it printed" in found["error"]
        assert set(found) == {"error"}


def test_its_own_page_is_answered(port: int) -> None:
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
        origin = {"Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}
        assert asked(port, "/api/runs", Host=host, **origin)[0] == 200
    assert asked(port, "/", Sec_Fetch_Site="cross-site")[0] == 200  # a link to it, which reads nothing


def test_two_hosts_or_a_name_that_was_given() -> None:
    assert refusal([(b"host", b"localhost"), (b"host", b"evil")], "127.0.0.1", False)
    assert refusal([], "127.0.0.1", False)
    assert refusal([(b"host", b"studio.lan:7860")], "studio.lan", False) is None
    assert refusal([(b"host", b"studio.lan:7860")], "0.0.0.0", False)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("reconstruct?photo=bundled-0&tokens=0", f"tokens is '0', expected a whole number from {TOKENS} to {TOKENS}"),
        ("reconstruct?photo=bundled-0&tokens=1e1", "tokens is '1e1'"),
        ("reconstruct?photo=bundled-0", "tokens is missing"),
        (f"reconstruct?photo=nobody&tokens={TOKENS}", "no longer kept here"),
        (f"token?photo=bundled-0&token={TOKENS}", f"from 0 to {TOKENS - 1}"),
        ("token?photo=bundled-0&token=²", "token is '²'"),
        ("between?first=bundled-0&last=bundled-1&share=nan", "share is 'nan', expected a number from 0 to 1"),
        ("between?first=bundled-0&last=bundled-1&share=2", "share is '2'"),
        ("generate?class=ant&seed=-1&guidance=1&steps=2", "seed is '-1'"),
        ("generate?class=ant&seed=1&guidance=1&steps=251", "steps is '251', expected a whole number from 1 to 250"),
        ("generate?class=ant&seed=1&guidance=inf&steps=2", "guidance is 'inf'"),
        ("run?run=../other", "leads out of"),
        ("run?run=%00", "character"),
        ("picture?run=one&name=../log.jsonl", "is no picture of the run"),
        (f"run?run={'x' * 500}", "run is missing or too long"),
        (f"run?run={'x' * 300}", "choose another"),
        (f"picture?run=one&name={'x' * 300}.png", ""),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(port: int, path: str, names: str) -> None:
    status, found, _ = asked(port, f"/api/{quote(path, safe='?&=%/.')}")
    assert status == 400
    assert names in found["error"]


def test_wrong_paths_methods_and_bodies_are_sentences_too(port: int) -> None:
    assert asked(port, "/api/nothing")[:2] == (404, {"error": "the app has nothing there (Not Found); reload the page"})
    assert asked(port, "/api/edit")[0] == 405
    for path in ("/page/../server.py", "/page/%2e%2e/server.py", "/page/..%2fserver.py"):
        assert asked(port, path)[0] == 404
    for body in (b"", b"[]", b"{", b"[" * 100_000, b'{"edits": 1}', b'{"photo": "bundled-0", "edits": [1]}', b"\xff"):
        status, found, _ = asked(port, "/api/edit", "POST", body)
        assert status == 400
        assert "reload the page" in found["error"]
    long = json.dumps({"photo": "bundled-0", "edits": [{"token": 0, "kind": "x" * 10_000}]}).encode()
    assert len(asked(port, "/api/edit", "POST", long)[1]["error"]) == server.MAX_SENTENCE
    assert asked(port, "/api/edit", "POST", b" " * (asking.MAX_JSON_BYTES + 1))[0] == 400


def test_a_photograph_is_dropped_within_limits(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(photograph())
    origin = f"http://127.0.0.1:{port}"
    status, found, _ = asked(port, "/api/photographs?name=mine.png", "POST", data, Origin=origin)
    assert (status, found["name"]) == (200, "mine.png")
    status, found, _ = asked(port, f"/api/reconstruct?photo={found['key']}&tokens={TOKENS}")
    assert status == 200
    assert found["psnr"] > 0
    status, found, _ = asked(port, "/api/photographs?name=x.png", "POST", data[: len(data) // 2])
    assert status == 400
    assert found["error"].startswith("x.png: is damaged or cut short")
    monkeypatch.setattr(server, "MAX_UPLOAD_BYTES", 1000)
    status, found, _ = asked(port, "/api/photographs?name=x.png", "POST", data)
    assert status == 400
    assert "the file has more than 0.000953674 MiB; shrink it" in found["error"]


def test_pixels_are_limited_before_they_are_decoded(port: int) -> None:
    header = png(photograph(1, 1))
    sides = header[12:16] + (12_000).to_bytes(4) * 2 + header[24:29]
    huge = header[:12] + sides + zlib.crc32(sides).to_bytes(4) + header[33:]
    status, found, _ = asked(port, "/api/photographs?name=bomb.png", "POST", huge)
    assert status == 400
    assert "bomb.png: " in found["error"]
    assert "pixels" in found["error"]


def test_a_picture_comes_as_events_and_ends(port: int) -> None:
    status, data, headers = asked(port, "/api/generate?class=cat&seed=3&guidance=1.5&steps=4")
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in data.decode().split("\n\n") if line]
    assert [event.get("step") for event in events] == [1, 2, 3, 4, None]
    assert events[-1]["done"]
    _, data, _ = asked(port, "/api/generate?class=dog&seed=3&guidance=1.5&steps=4")
    assert "'dog' is no class of this generator" in json.loads(data.decode().removeprefix("data: "))["error"]


def test_who_goes_away_stops_the_sampling_and_the_next_is_answered(port: int, studio: Studio) -> None:
    steps: list[int] = []
    paint = studio.pipeline.paint  # type of a pipeline, which the studio has

    def counted(latents):
        steps.append(1)
        time.sleep(0.02)
        return paint(latents)

    studio.pipeline.paint = counted
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/api/generate?class=cat&seed=3&guidance=1&steps=250")
        answer = connection.getresponse()
        answer.read(100)
        connection.sock.shutdown(socket.SHUT_RDWR)
        answer.close()
        connection.close()
        assert asked(port, "/api/about")[0] == 200  # which needs the models, so that the sampling has ended
        assert len(steps) < 125
    finally:
        studio.pipeline.paint = paint


def test_whoever_does_not_read_keeps_nobody_else_waiting(
    port: int, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*given: Any) -> None:
        show = given[-2]
        for step in range(60):
            show({"step": step, "image": "x" * 500_000})
        show({"done": True})

    monkeypatch.setattr(studio, "generate", generate)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as reader:
        line = f"GET /api/generate?class=cat&seed=3&guidance=1&steps=60 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        reader.sendall(f"{line}Connection: close\r\n\r\n".encode())
        reader.recv(100)
        assert asked(port, "/api/about")[0] == 200
        found = bytearray()
        while part := reader.recv(1 << 20):
            found += part
    assert b'{"done": true}' in found[-200:]
    assert found.count(b'"step"') < 60  # the oldest of those that were not read are gone


def test_what_nobody_waits_for_any_more_is_not_computed(
    port: int, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, calls = threading.Event(), threading.Event(), []
    reconstruct = studio.reconstruct

    def held() -> dict[str, object]:
        begun.set()
        assert go_on.wait(20)
        return {}

    def counted(key: str, tokens: int) -> dict[str, object]:
        calls.append(key)
        return reconstruct(key, tokens)

    monkeypatch.setattr(studio, "about", held)
    monkeypatch.setattr(studio, "reconstruct", counted)
    holder = threading.Thread(target=asked, args=(port, "/api/about"))
    holder.start()
    assert begun.wait(20)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as gone:
            path = f"/api/reconstruct?photo=bundled-0&tokens={TOKENS}"
            gone.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            time.sleep(0.05)
    time.sleep(0.2)
    go_on.set()
    holder.join(20)
    assert asked(port, f"/api/reconstruct?photo=bundled-1&tokens={TOKENS}")[0] == 200
    assert calls == ["bundled-1"]


def test_runs_are_shown(port: int) -> None:
    assert [(run["name"], run["message"]) for run in asked(port, "/api/runs")[1]["runs"]] == [("one", "half a \ud83d")]
    assert asked(port, "/api/run?run=one")[1]["curves"] == {"loss": [[1, 0.5]]}
    status, data, headers = asked(port, "/api/picture?run=one&name=step-1.png")
    assert (status, headers["content-type"], data[:4]) == (200, "image/png", b"\x89PNG")


def test_a_port_that_is_taken_or_a_name_that_is_none_is_refused() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(InputError, match=r"cannot listen on .*another --host or"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="cannot listen on"):
        listen("no such name", 0)


def test_the_command_refuses_before_it_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    program = Program(capsys)
    program.refuses("app", "--port", "65536", names=("'65536' is no port",))
    program.refuses("app", "--port", "0", "--tokenizer", tmp_path / "none", names=("none",))
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        program.refuses("app", "--port", port, names=(f"127.0.0.1 port {port}", "--port"))


def test_the_command_names_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Program(capsys).refuses("app", names=("starlette and uvicorn", "pip install 'softvq[serve]'"))
