"""Load and fuzz: what the benchmarks do at length and the tests for a moment."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import itertools
import json
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

TIMEOUT = 100.0


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request."""

    method: str
    path: str
    body: bytes = b""
    kind: str = "image/png"


class Asker:
    """A connection that is kept, as a client has it."""

    def __init__(self, port: int) -> None:
        self._port, self._connection = port, http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)

    def __call__(self, ask: Ask) -> tuple[int, dict[str, str], bytes]:
        for attempt in (1, 2):
            fresh = self._connection.sock is None
            try:
                headers = {"Content-Type": ask.kind} if ask.method == "POST" else {}
                self._connection.request(ask.method, ask.path, ask.body if ask.method == "POST" else None, headers)
                answer = self._connection.getresponse()
                return answer.status, {name.lower(): text for name, text in answer.getheaders()}, answer.read()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self.close()
                if fresh or attempt == 2:  # a kept connection may have been closed for its age
                    raise
        raise AssertionError

    def close(self) -> None:
        self._connection.close()


def once(port: int, ask: Ask) -> tuple[int, dict[str, str], bytes]:
    """Ask over a connection of its own."""
    with contextlib.closing(Asker(port)) as asker:
        return asker(ask)


def closed_loop(port: int, ask: Callable[[int], Ask], clients: int, seconds: float) -> dict[str, float]:
    """Let clients ask one request after the other; return requests/s and quantiles of the latency."""
    numbers, until = itertools.count(), time.monotonic() + seconds

    def client() -> list[float]:
        asker, took = Asker(port), []
        while (began := time.monotonic()) < until or not took:
            status, _, body = asker(ask(next(numbers)))
            assert status == 200, body[:300]
            took.append(time.monotonic() - began)
        asker.close()
        return took

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        took = [one for each in [pool.submit(client) for _ in range(clients)] for one in each.result()]
    return {"requests_per_second": len(took) / (time.monotonic() - began), **quantiles(took)}


def quantiles(took: list[float]) -> dict[str, float]:
    return {"p50": float(np.quantile(took, 0.5)), "p99": float(np.quantile(took, 0.99))}


def overload(port: int, ask: Callable[[int], Ask], rate: float, seconds: float, pid: int) -> dict[str, Any]:
    """Ask at a rate whatever is answered; return what was answered, and what memory did meanwhile."""
    counts: Counter[str] = Counter()
    took: list[float] = []
    lock, memory = threading.Lock(), [resident(pid)]

    def one(number: int) -> None:
        asker, began = Asker(port), time.monotonic()
        try:
            status, headers, _ = asker(ask(number))
            told = status == 503 and headers.get("retry-after", "").isdigit()
            what = {200: "answered"}.get(status, "refused" if told else f"other ({status})")
        except (OSError, http.client.HTTPException) as error:
            what = f"lost ({type(error).__name__})"
        finally:
            asker.close()
        with lock:
            counts[what] += 1
            if what == "answered":
                took.append(time.monotonic() - began)

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(256) as pool:
        for number in itertools.count():
            due = began + number / rate
            if due > began + seconds:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            pool.submit(one, number)
            if time.monotonic() - began > len(memory) * seconds / 40:
                memory.append(resident(pid))
    quarter = max(1, len(memory) // 4)
    growth = statistics.mean(memory[-quarter:]) - statistics.mean(memory[quarter : 2 * quarter] or memory)
    sent = sum(counts.values())
    named = {name: counts.pop(name, 0) for name in ("answered", "refused")}
    return {
        "sent": sent, **named, "lost_or_other": dict(counts), "offered_per_second": rate,
        "answered_per_second": named["answered"] / (time.monotonic() - began), **(quantiles(took) if took else {}),
        "memory_mib": {"first": memory[0], "last": memory[-1], "most": max(memory), "growth": growth},
    }  # fmt: skip


def resident(pid: int) -> float:
    """Return the MiB a process has in memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def batch_difference(port: int, label: object, batch: int) -> int:
    """Return by how many of 256 levels, at most, an image differs between alone and in a full batch."""

    def images(seeds: list[int]) -> list[np.ndarray]:
        body = json.dumps({"labels": [label] * len(seeds), "seeds": seeds}).encode()
        _, _, answer = once(port, Ask("POST", "/v1/generate", body, "application/json"))
        files = [io.BytesIO(base64.b64decode(image)) for image in json.loads(answer)["images"]]
        return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files]

    seeds = list(range(batch))
    alone = [images([seed])[0] for seed in seeds]
    return max(int(np.abs(a - b).max()) for a, b in zip(alone, images(seeds), strict=True))


def fuzz(port: int, photo: bytes, examples: int) -> dict[str, Any]:
    """Send requests made from the schema, and damaged ones; return what was answered. Raises on what may not be."""
    _, _, text = once(port, Ask("GET", "/openapi.json"))
    asks = st.one_of(*operations(json.loads(text), photo), strays())
    counts: Counter[str] = Counter()
    slowest = 0.0

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(asks)
    def send(ask: Ask) -> None:
        nonlocal slowest
        began = time.monotonic()
        status, headers, body = once(port, ask)
        slowest = max(slowest, time.monotonic() - began)
        assert 200 <= status < 500, (ask, status, body[:300])
        if status >= 400:
            assert set(json.loads(body)) == {"error", "request_id"}, (ask, body[:300])
            assert b"Traceback" not in body
        if "event-stream" in headers.get("content-type", ""):
            assert b"event: images" in body, (ask, body[-300:])
        counts[f"{status}"] += 1

    send()
    return {"requests": sum(counts.values()), "by_status": dict(sorted(counts.items())), "slowest_seconds": slowest}


def operations(schema: dict[str, Any], photo: bytes) -> list[st.SearchStrategy[Ask]]:
    """Return a strategy for every operation of a schema, with bodies that are right, nearly right, and anything."""
    found = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            query = queries(operation.get("parameters", []), schema)
            bodies = [st.just((b"", "text/plain"))]
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                if kind == "application/json":
                    right = of_schema(content["schema"], schema).map(lambda value: json.dumps(value).encode())
                else:
                    right = st.just(photo)
                wrong = st.one_of(st.binary(max_size=200), anything().map(lambda value: json.dumps(value).encode()))
                bodies += [st.tuples(st.one_of(right, right, damaged(right), wrong), st.just(kind))] * 2
            made = st.builds(
                lambda q, b, method=method, path=path: Ask(method.upper(), path + q, *b), query, st.one_of(*bodies)
            )
            found += [made] * (3 if method == "post" else 1)
    return found


def queries(parameters: list[dict[str, Any]], schema: dict[str, Any]) -> st.SearchStrategy[str]:
    names = {
        one["name"]: st.one_of(of_schema(one["schema"], schema), st.integers(), st.sampled_from(["", "x", "%00"]))
        for one in parameters
    }
    chosen = st.fixed_dictionaries({}, optional=names)
    return chosen.map(lambda given: "?" + "&".join(f"{name}={value}" for name, value in given.items()) if given else "")


def of_schema(schema: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return values that a JSON schema, of the few kinds that ours has, allows."""
    if "$ref" in schema:
        return of_schema(whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return st.one_of(*(of_schema(one, whole) for one in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        fields = {name: of_schema(one, whole) for name, one in schema["properties"].items()}
        needed = {name: fields.pop(name) for name in schema.get("required", [])}
        return st.fixed_dictionaries(needed, optional=fields)
    if kind == "array":
        items = of_schema(schema["items"], whole)
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 4))
    if kind == "integer":
        return st.integers(schema.get("minimum"), schema.get("maximum"))
    if kind == "number":
        return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, width=32)
    return st.none() if kind == "null" else st.text(max_size=schema.get("maxLength", 20))


def anything() -> st.SearchStrategy[Any]:
    leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9))
    names = st.sampled_from(["labels", "seeds", "steps", "guidance", "previews", "latents", "tokenizer", "x"])
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=9
    )


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Return bytes cut short, with some changed, or twice over."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data * draw(st.integers(1, 2)))


def strays() -> st.SearchStrategy[Ask]:
    """Return requests for what there is not."""
    methods = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
    letters = st.text("abcz019/._-%~", max_size=20).map(lambda text: "/" + text)
    known = st.sampled_from(["/v1/encode/", "/v1", "/metrics/x", "/v1/../metrics", "//", "/v1/generate/stream/"])
    return st.builds(
        Ask, methods, known | letters, st.binary(max_size=50), st.sampled_from(["text/plain", "image/png", ""])
    )
