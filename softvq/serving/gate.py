"""What every request passes before it reaches an endpoint: who asks, how many are there already, how long is the body.

The gate also gives each request an id, answers mistakes of ours with a sentence, counts, and writes the access log: one
JSON object a line.
"""

import asyncio
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from softvq.serving.keys import ApiKeys, is_loopback
from softvq.serving.limits import Limits

__all__ = ["OPEN_PATHS", "Gate", "error_body"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/healthz", "/readyz", "/openapi.json")
"""Answered without a key."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
CLOSED = 499  # nginx' number for a client that went away
EXTRA_SECONDS = 10.0  # for codecs and a slow reader, beyond upload and deadline
DRAIN = 4  # bodies up to so many times the limit are read to their end, so that the refusal arrives
MAX_RETRY_SECONDS = 60

access = logging.getLogger("softvq.access")
log = logging.getLogger("softvq.serving")


class Refusal(Exception):
    """A request is not let in."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers or {}


class Gate:
    """An ASGI application around another one.

    Args:
        app: Gets whole bodies.
        limits: Of bodies, of requests at a time, and of times.
        paths: What there is, for the labels of metrics.
        keys: Who may ask; None lets everybody.
        local: Whether only names of this machine may stand in the Host header, so that no page in a browser reaches the
            server by a name of its own.
        count: Told the endpoint, the status and the seconds of each request.
        backlog: Gives the seconds that the queue will take.
        finish: Works off the queue, for as long as the limits say, and refuses the rest.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        paths: frozenset[str],
        keys: ApiKeys | None = None,
        local: bool = False,
        count: Callable[[str, int, float], object] = lambda endpoint, status, seconds: None,
        backlog: Callable[[], float] = lambda: 0.0,
        finish: Callable[[], object] = lambda: None,
    ) -> None:
        self._app, self._limits, self._paths, self._keys, self._local = app, limits, paths, keys, local
        self._count, self._backlog, self.finish = count, backlog, finish
        self.inside = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request; everything else is passed through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        try:
            await self._let_in(visit, receive)
        except Refusal as refusal:
            await visit.refuse(refusal)
        except asyncio.CancelledError:
            visit.status = visit.status or CLOSED
            raise
        except TimeoutError:
            await visit.refuse(
                Refusal(504, "the answer took too long; ask for less, or again when there is less to do")
            )
        except Exception:
            log.exception("request %s failed", visit.id)
            await visit.refuse(Refusal(500, "this is a mistake in softvq; the log of the server tells more"))
        finally:
            visit.seconds = time.monotonic() - visit.began
            self._count(scope["path"] if scope["path"] in self._paths else "other", visit.status, visit.seconds)
            access.info(visit.line())

    async def _let_in(self, visit: "_Visit", receive: Receive) -> None:
        try:
            self._check(visit)
        except Refusal:
            await self._drain(visit, receive)
            raise
        if visit.scope["method"] != "POST":
            await self._app(visit.scope, receive, visit.send)
            return
        self.inside += 1
        try:
            body = await self._body(visit, receive)
            async with asyncio.timeout(self._limits.deadline + EXTRA_SECONDS):
                await self._app(visit.scope, _replayed(body, receive), visit.send)
        finally:
            self.inside -= 1

    def _check(self, visit: "_Visit") -> None:
        scope, headers = visit.scope, visit.headers
        host = re.sub(r":\d*$", "", headers.get("host", ""))
        if self._local and not is_loopback(host):
            raise Refusal(421, "this server answers to localhost and 127.0.0.1 alone; call it by one of them")
        if self._keys is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._keys.accepts(key.strip()):
                sentence = "an API key is needed; send the header Authorization: Bearer KEY"
                raise Refusal(401, sentence, {"www-authenticate": "Bearer"})
        if scope["method"] == "POST":
            if visit.length > self._limits.body_bytes:
                raise self._too_long()
            if self.inside >= self._limits.queue:
                seconds = min(MAX_RETRY_SECONDS, max(1, math.ceil(self._backlog())))
                sentence = f"{self.inside} requests are waiting, which is the limit; ask again in {seconds} s"
                raise Refusal(503, sentence, {"retry-after": str(seconds)})

    async def _body(self, visit: "_Visit", receive: Receive) -> bytes:
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.upload):
                more = True
                while more:
                    chunk, more = await visit.read(receive)
                    parts.append(chunk)
                    if visit.bytes_in > self._limits.body_bytes:
                        if more:
                            await self._drain(visit, receive)
                        raise self._too_long()
        except TimeoutError as error:
            raise Refusal(408, f"the body took more than {self._limits.upload:g} s; send less, or faster") from error
        return b"".join(parts)

    async def _drain(self, visit: "_Visit", receive: Receive) -> None:
        """Read on for a while: a connection that is closed while its client still sends loses the answer."""
        most = DRAIN * self._limits.body_bytes
        if visit.scope["method"] not in {"POST", "PUT", "PATCH"} or visit.length > most or visit.expects:
            return
        try:
            async with asyncio.timeout(self._limits.upload):
                more = True
                while more and visit.bytes_in <= most:
                    _, more = await visit.read(receive)
        except TimeoutError:
            return

    def _too_long(self) -> Refusal:
        return Refusal(413, f"the body has more than {self._limits.body_bytes:,} bytes; send a smaller image")


class _Visit:
    """What is known of a request, and the way its answer goes."""

    def __init__(self, scope: MutableMapping[str, Any], send: Send) -> None:
        self.scope, self._send, self.began = scope, send, time.monotonic()
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        length = self.headers.get("content-length", "0")
        self.length = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
        self.expects = "expect" in self.headers
        self.bytes_in = self.bytes_out = self.status = 0
        self.seconds = 0.0
        scope.setdefault("state", {})["request_id"] = self.id

    async def read(self, receive: Receive) -> tuple[bytes, bool]:
        """Return a part of the body, and whether there is more."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(CLOSED, "the client went away")
        chunk = message.get("body", b"")
        self.bytes_in += len(chunk)
        return chunk, message.get("more_body", False)

    async def send(self, message: Message) -> None:
        """Pass a message of the answer on, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = [(b"x-request-id", self.id.encode()), (b"cache-control", b"no-store")]
            message = {
                **message,
                "headers": [*message.get("headers", ()), *extra, (b"x-content-type-options", b"nosniff")],
            }
        else:
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a sentence, unless an answer has begun or nobody is there."""
        if self.status or refusal.status == CLOSED:
            self.status = self.status or CLOSED
            return
        body = error_body(refusal.sentence, self.id)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})

    def line(self) -> str:
        """Return what the access log says."""
        client = self.scope.get("client")
        said = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": self.id,
            "client": client[0] if client else None,
            "method": self.scope["method"],
            "path": self.scope["path"][:200],
            "status": self.status,
            "seconds": round(self.seconds, 4),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        return json.dumps(said)


def error_body(sentence: str, request_id: str) -> bytes:
    """Return what every error looks like: a sentence, and the request it is about."""
    text = "".join(char if char.isprintable() else " " for char in sentence)
    short = " ".join(text.split())[:500].encode(errors="replace").decode()
    return json.dumps({"error": short, "request_id": request_id}).encode()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then whatever comes, which is the end of the connection."""
    rest = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": rest.pop(), "more_body": False} if rest else await receive()

    return again
