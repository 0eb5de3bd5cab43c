"""A server in this process, on loopback, with the smallest models; and ways to talk to it."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from softvq.client import Client
from softvq.generators.generator import LatentGenerator
from softvq.serving.app import create_app
from softvq.serving.limits import Limits
from softvq.serving.models import Models
from softvq.serving.server import listen
from softvq.tokenizers.autoencoder import ImageTokenizer


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """Return the sentence of an error, which has to be all there is."""
        assert set(self.json) == {"error", "request_id"}
        assert self.json["request_id"] == self.headers["x-request-id"]
        sentence = self.json["error"]
        assert sentence
        assert "Traceback" not in sentence
        assert "\n" not in sentence
        return sentence


@dataclasses.dataclass(frozen=True)
class Served:
    port: int
    models: Models
    app: Any

    @property
    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.port}", timeout=30.0)

    def __call__(self, method: str, path: str, body: bytes | object = None, **headers: str) -> Answer:
        """Ask once; what is not bytes is sent as JSON, and `content_type` is a header."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            named = {"content-type": "application/json", **named}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30.0)
        with contextlib.closing(connection):
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())

    def image(self, path: str, data: bytes, **headers: str) -> Answer:
        return self("POST", path, data, **{"content_type": "image/png", **headers})


def load(folder: Path, *, generator: bool = True) -> Models:
    """Return the models that `make_generator` wrote."""
    made = LatentGenerator.from_pretrained(folder) if generator else None
    return Models(ImageTokenizer.from_pretrained(folder / "tokenizer"), made)


@contextlib.contextmanager
def serving(models: Models, limits: Limits | None = None, **options: Any) -> Iterator[Served]:
    """Run a server in a thread."""
    app = create_app(models, limits, **options)
    with listen("127.0.0.1", 0) as made:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [made]})
        thread.start()
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        try:
            yield Served(made.getsockname()[1], models, app)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
