"""The app's server: its page, and what the page asks for, one computation at a time."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from softvq.app import runs
from softvq.app.asking import MAX_UPLOAD_BYTES, body_of, json_of, number, text, whole
from softvq.app.guard import Guard
from softvq.app.studio import MAX_GUIDANCE, MAX_STEPS, Stopped, Studio
from softvq.app.tokens import TokenDesk
from softvq.errors import InputError, RunError

__all__ = ["build", "server_of"]

PAGE = Path(__file__).parent / "page"
GONE = 499  # what is answered to nobody: the page has asked for something else since
MAX_CONNECTIONS = 64
MAX_SENTENCE = 500
MAX_SEED = 2**53 - 1  # largest whole number that JavaScript tells from its neighbours
POLL_SECONDS = 0.2
UNREAD_EVENTS = 8


class _Desk:
    """Answers to what the page asks for; models are used by one request at a time."""

    def __init__(self, studio: Studio, runs_folder: Path) -> None:
        self.studio, self.tokens, self.runs = studio, TokenDesk(studio), runs_folder
        self._turn = asyncio.Lock()

    async def about(self, request: Request) -> Response:
        found = await self._compute(request, self.studio.about)
        return _json({**found, "runs": str(self.runs)})

    async def add(self, request: Request) -> Response:
        name = text(request.query_params, "name")
        data = await body_of(request, MAX_UPLOAD_BYTES)
        return _json(await self._compute(request, self.studio.add, data, name))

    async def reconstruct(self, request: Request) -> Response:
        given, config = request.query_params, self.studio.tokenizer.config
        fewest = config.min_latent_tokens or config.num_latent_tokens
        tokens = whole(given, "tokens", fewest, config.num_latent_tokens)
        return _json(await self._compute(request, self.studio.reconstruct, text(given, "photo"), tokens))

    async def maps(self, request: Request) -> Response:
        stop = threading.Event()
        leaving = asyncio.create_task(_set_when_gone(request, stop))
        try:
            found = await self._compute(request, self.tokens.maps, text(request.query_params, "photo"), stop)
        finally:
            leaving.cancel()
        return _json(found)

    async def token(self, request: Request) -> Response:
        given = request.query_params
        place = whole(given, "token", 0, self.studio.tokenizer.config.num_latent_tokens - 1)
        return _json(await self._compute(request, self.tokens.token, text(given, "photo"), place))

    async def edit(self, request: Request) -> Response:
        given = await json_of(request)
        edits = given.get("edits")
        most = self.studio.tokenizer.config.num_latent_tokens
        if not isinstance(edits, list) or len(edits) > most or not all(isinstance(edit, dict) for edit in edits):
            raise InputError(f"edits is no list of at most {most} objects; reload the page")
        return _json(await self._compute(request, self.tokens.edit, str(given.get("photo")), edits))

    async def between(self, request: Request) -> Response:
        given = request.query_params
        ends, share = (text(given, "first"), text(given, "last")), number(given, "share", 0.0, 1.0)
        return _json(await self._compute(request, self.studio.between, *ends, share))

    async def generate(self, request: Request) -> Response:
        given = request.query_params
        asked = (
            text(given, "class"),
            whole(given, "seed", 0, MAX_SEED),
            number(given, "guidance", 0.0, MAX_GUIDANCE),
            whole(given, "steps", 1, MAX_STEPS),
        )
        return StreamingResponse(self._events(asked), media_type="text/event-stream")

    async def list_runs(self, request: Request) -> Response:
        return _json({"runs": await anyio.to_thread.run_sync(runs.list_runs, self.runs)})

    async def run(self, request: Request) -> Response:
        name = text(request.query_params, "run")
        return _json(await anyio.to_thread.run_sync(runs.read_run, self.runs, name))

    async def picture(self, request: Request) -> Response:
        names = text(request.query_params, "run"), text(request.query_params, "name")
        data, media = await anyio.to_thread.run_sync(runs.read_picture, self.runs, *names)
        return Response(data, media_type=media)

    async def _compute(self, request: Request, function: Callable[..., Any], *given: Any) -> Any:
        async with self._turn:
            if await request.is_disconnected():
                raise Stopped
            return await anyio.to_thread.run_sync(function, *given)

    async def _events(self, asked: tuple[str, int, float, int]) -> AsyncIterator[str]:
        """Yield what `Studio.generate` shows as server-sent events; whoever goes away stops it after the step."""
        loop, stop = asyncio.get_running_loop(), threading.Event()
        shown: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def put(event: dict[str, Any] | None) -> None:
            while event is not None and shown.qsize() >= UNREAD_EVENTS:  # who reads slowly misses older previews
                shown.get_nowait()
            shown.put_nowait(event)

        def show(event: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(put, event)

        def draw() -> None:
            try:
                self.studio.generate(*asked, show, stop)
            except Stopped:
                pass
            except Exception as error:  # the answer has begun, so that its last event has to tell
                logging.getLogger(__name__).debug("sampling failed", exc_info=error)
                show({"error": _sentence(error)})
            finally:
                show(None)

        async def take_turn() -> None:
            async with self._turn:  # not while events are sent, which takes as long as the reader likes
                await loop.run_in_executor(None, draw)

        drawing = asyncio.create_task(take_turn())
        try:
            while (event := await shown.get()) is not None:
                yield f"data: {json.dumps(event)}\n\n"
        finally:
            stop.set()
            with anyio.CancelScope(shield=True):  # the models are in use until the step ends
                await drawing


def build(studio: Studio, runs_folder: Path, host: str) -> Guard:
    """Return the app as an ASGI application.

    Args:
        studio: Models and photographs.
        runs_folder: Folder of runs, which need not be there.
        host: Name or address that it is reached under.

    Returns:
        The application.
    """
    desk = _Desk(studio, runs_folder)

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    routes = [
        Route("/", page),
        Mount("/page", StaticFiles(directory=PAGE)),
        Route("/api/about", desk.about),
        Route("/api/photographs", desk.add, methods=["POST"]),
        Route("/api/reconstruct", desk.reconstruct),
        Route("/api/maps", desk.maps),
        Route("/api/token", desk.token),
        Route("/api/edit", desk.edit, methods=["POST"]),
        Route("/api/between", desk.between),
        Route("/api/generate", desk.generate),
        Route("/api/runs", desk.list_runs),
        Route("/api/run", desk.run),
        Route("/api/picture", desk.picture),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        kind: _explain for kind in (HTTPException, InputError, RunError, Stopped, Exception)
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host)


def server_of(app: Guard) -> uvicorn.Server:
    """Return what serves the app; `run(sockets=[...])` of it answers until a signal comes."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)


async def _set_when_gone(request: Request, stop: threading.Event) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(POLL_SECONDS)
    stop.set()


def _json(content: Any, status: int = 200) -> Response:
    """Answer in ASCII: names and notes of runs may hold half surrogates, which UTF-8 cannot."""
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


async def _explain(request: Request, error: Exception) -> Response:
    if isinstance(error, Stopped):
        return Response(status_code=GONE)
    status = 400 if isinstance(error, InputError) else 500
    if isinstance(error, HTTPException):
        status = error.status_code
    return _json({"error": _sentence(error)[:MAX_SENTENCE]}, status)


def _sentence(error: Exception) -> str:
    """Return what is told on the page."""
    if isinstance(error, HTTPException):
        return f"the app has nothing there ({error.detail}); reload the page"
    if isinstance(error, InputError | RunError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return "out of memory; start the app with a smaller model, or with another --device"
    return f"{type(error).__name__}: {error} - this is a mistake in softvq, please report it"
