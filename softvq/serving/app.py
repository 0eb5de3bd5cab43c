"""The endpoints: FastAPI behind the gate."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

import softvq
from softvq.errors import InputError, RunError
from softvq.serving.batching import Stopped
from softvq.serving.gate import CLOSED, Gate, error_body
from softvq.serving.keys import ApiKeys
from softvq.serving.limits import Limits
from softvq.serving.models import Models
from softvq.serving.schema import (
    ERRORS,
    EVENTS,
    PICTURE,
    Encoded,
    Generated,
    decode_body,
    generate_model,
    image_body,
    latents_model,
    sentence,
)
from softvq.serving.service import Gone, Late, Service, png, unforeseen

__all__ = ["create_app"]

BINARY = "application/octet-stream"


def create_app(
    models: Models, limits: Limits | None = None, *, keys: ApiKeys | None = None, local: bool = False
) -> Gate:
    """Return the ASGI application, whose models' thread runs already; the end of its lifespan finishes the queue.

    Args:
        models: What to serve.
        limits: Of what is taken on.
        keys: Who may ask; None lets everybody.
        local: Whether it answers to names of this machine alone.

    Returns:
        The application.
    """
    limits = limits or Limits()
    service = Service(models, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="softvq",
        version=softvq.__version__,
        description="Images to a few continuous tokens and back.",
        docs_url=None,
        redirect_slashes=False,
        redoc_url=None,
        lifespan=lifespan,
    )  # fmt: skip - the pages of docs_url load scripts from elsewhere
    _errors(app)
    app.include_router(_state_routes(service))
    router = APIRouter(prefix="/v1", dependencies=[Security(HTTPBearer(auto_error=False))] if keys else [])
    _image_routes(router, service)
    if models.pipeline is not None:
        _generation_routes(router, service)
    app.include_router(router)
    paths = frozenset(app.openapi()["paths"])
    gate = Gate(
        app, limits=limits, paths=paths, keys=keys, local=local, count=service.metrics.request,
        backlog=service.batcher.backlog, finish=service.finish,
    )  # fmt: skip
    service.metrics.gauge("softvq_queue_requests", "Requests that wait for the models.", service.batcher.waiting)
    service.metrics.gauge("softvq_inside_requests", "Requests taken on.", lambda: gate.inside)
    return gate


def _state_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["state"])

    @router.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz", summary="Whether work is taken on", responses={503: ERRORS[503]})
    async def readyz() -> dict[str, str]:
        if not service.batcher.alive():
            raise Stopped("the models are not at work; the server is shutting down")
        return {"status": "ready"}

    @router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", summary="What is loaded, and the limits")
    async def models() -> dict[str, Any]:
        limits = service.limits
        said = {"batch": limits.batch, "images": limits.images, "body_bytes": limits.body_bytes}
        said |= {"pixels": limits.pixels, "steps": service.models.most_steps(limits.steps)}
        return {**service.models.describe(), "limits": said}

    return router


def _image_routes(router: APIRouter, service: Service) -> None:
    least, most = service.models.tokens
    latents = latents_model(service.models)
    image: dict[str, Any] = {"openapi_extra": image_body(), "tags": ["images"]}

    @router.post(
        "/reconstruct", summary="An image from its tokens", responses=PICTURE, response_class=Response, **image
    )
    async def reconstruct(
        request: Request,
        tokens: Annotated[int, Query(ge=least, le=most, description="the first so many of them are decoded")] = most,
    ) -> Response:
        _expect(request, "image/", BINARY)
        job = await service.coded(service.image_job, await request.body(), ("reconstruct", tokens))
        return Response(await service.coded(png, await service.answer(job, request)), media_type="image/png")

    binary = {"content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}}

    @router.post(
        "/encode", summary="The latents of an image", response_model=Encoded, responses={**ERRORS, 200: binary}, **image
    )
    async def encode(
        request: Request,
        format: Annotated[Literal["json", "safetensors"], Query(description="safetensors is a latent file")] = "json",
    ) -> Any:
        _expect(request, "image/", BINARY)
        job = await service.coded(service.image_job, await request.body(), ("encode", None))
        found = await service.answer(job, request)
        if format == "safetensors":
            return Response(service.latent_file(found), media_type=BINARY)
        return Encoded(latents=found.tolist(), tokenizer=service.models.latent_fingerprint)

    @router.post(
        "/decode", summary="An image of latents", responses=PICTURE, response_class=Response,
        openapi_extra=decode_body(latents), tags=["images"],
    )  # fmt: skip
    async def decode(request: Request) -> Response:
        kind = _expect(request, "application/json", BINARY)
        body = await request.body()
        if kind == BINARY:
            rows = service.latents_in(body)
        else:
            rows = service.latents_of(await service.coded(latents.model_validate_json, body))
        found = await service.answer(service.decode_job(rows), request)
        return Response(await service.coded(png, found), media_type="image/png")


def _generation_routes(router: APIRouter, service: Service) -> None:
    plain = generate_model(service.models, service.limits, stream=False)
    stream = generate_model(service.models, service.limits, stream=True)

    async def generate(request: Request, asked: Any) -> dict[str, Any]:
        job, seeds = service.generate_job(asked)
        return await service.generated(await service.answer(job, request), seeds)

    async def generate_stream(asked: Any) -> Response:
        job, seeds = service.generate_job(asked)
        return StreamingResponse(await service.events(job, seeds), media_type="text/event-stream")

    async def is_json(request: Request) -> None:
        _expect(request, "application/json")

    # FastAPI reads bodies from annotations, and what may be asked for is known only now
    generate.__annotations__["asked"] = plain
    generate_stream.__annotations__["asked"] = stream
    router.add_api_route(
        "/generate", generate, methods=["POST"], summary="New images, one for each label and seed", responses=ERRORS,
        response_model=Generated, tags=["generation"], dependencies=[Depends(is_json)],
    )  # fmt: skip
    router.add_api_route(
        "/generate/stream", generate_stream, methods=["POST"], summary="New images, with previews on the way",
        responses=EVENTS, response_class=StreamingResponse, tags=["generation"], dependencies=[Depends(is_json)],
    )  # fmt: skip


def _expect(request: Request, *kinds: str) -> str:
    """Return the kind of a body, if it is one of these; forms, which any page may send, are never."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not any(kind == one or (one.endswith("/") and kind.startswith(one)) for one in kinds):
        expected = " or ".join("image/jpeg, image/png, image/webp" if one == "image/" else one for one in kinds)
        raise HTTPException(415, f"content-type is {kind!r}, expected {expected}")
    return kind


def _errors(app: FastAPI) -> None:
    """Answer every error with one sentence."""

    def failure(request: Request, status: int, text: str, retry: bool = False) -> Response:
        headers = {"Retry-After": "1"} if retry else None
        body = json.loads(error_body(text, request.scope.get("state", {}).get("request_id", "")))
        return JSONResponse(body, status, headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = {
            400: "the body is no JSON in UTF-8; /openapi.json tells what is expected",
            404: f"there is no {request.url.path}; /openapi.json tells what there is",
            405: "use another method",
        }
        answer = failure(request, error.status_code, said.get(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def invalid(request: Request, error: Any) -> Response:
        return failure(request, 422, sentence(error))

    known = {Stopped: 503, Late: 504, Gone: CLOSED}

    @app.exception_handler(InputError)
    @app.exception_handler(RunError)
    async def refused(request: Request, error: Exception) -> Response:
        status = next((number for kind, number in known.items() if isinstance(error, kind)), 422)
        return failure(request, status, str(error), retry=status == 503)

    @app.exception_handler(Exception)
    async def mistake(request: Request, error: Exception) -> Response:
        status, said = unforeseen(error)
        return failure(request, status, said, retry=status == 503)
