"""What the tests of the app share: a studio of tiny models, and the server in a thread."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from softvq.app.photographs import Bundled
from softvq.app.server import build, server_of
from softvq.app.studio import Studio
from softvq.pipeline import GenerationPipeline
from softvq.serving.server import listen
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from tests.generators import make_generator
from tests.program import MODEL, make_photos


def tokenizer_of(config: TokenizerConfig = MODEL) -> ImageTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageTokenizer(config).eval()


def bundled_in(folder: Path, count: int = 6) -> list[Bundled]:
    paths = make_photos(folder, tuple(f"{i}.png" for i in range(count)))
    return [Bundled(path=path, name=f"photo {path.stem}", credit="by us") for path in paths]


def studio_in(folder: Path, config: TokenizerConfig = MODEL, kind: str = "sit") -> Studio:
    make_generator(folder / "generator", kind)
    pipeline = GenerationPipeline.from_pretrained(folder / "generator")
    return Studio(tokenizer_of(config), pipeline, bundled_in(folder / "photos"), ("tiny", "small"))


@contextlib.contextmanager
def served(studio: Studio, runs: Path) -> Iterator[int]:
    """Serve in a thread, and give the port."""
    with listen("127.0.0.1", 0) as listening:
        server = server_of(build(studio, runs, "127.0.0.1"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def asked(
    port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Return status, body (decoded if it is JSON) and headers; `_` in a header's name stands for `-`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        data = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()
    is_json = found.get("content-type", "").startswith("application/json")
    return answer.status, json.loads(data) if is_json else data, found
