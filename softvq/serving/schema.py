"""What requests and answers look like, for checking them and for the OpenAPI schema, from what is loaded."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, WithJsonSchema, create_model

from softvq.serving.limits import Limits
from softvq.serving.models import Models

__all__ = [
    "ERRORS",
    "EVENTS",
    "PICTURE",
    "Encoded",
    "Failure",
    "Generated",
    "decode_body",
    "generate_model",
    "image_body",
    "latents_model",
    "sentence",
]

LARGEST_LATENT = 1000.0
"""Normalised latents have a deviation of 1; far larger ones overflow."""
MAX_SEED = 2**53 - 1
"""Every JSON reader keeps whole numbers so far."""


class Failure(BaseModel):
    """Every error."""

    error: str = Field(examples=["image: is empty (0 bytes); fetch it again or remove it"])
    request_id: str = Field(examples=["5f1c07e0aa6e4b3d"])


class Encoded(BaseModel):
    """Latents of an image."""

    latents: list[list[float]] = Field(description="normalised, one row for each token")
    tokenizer: str = Field(
        description="fingerprint of what decides latents; give it back to decode", examples=["9f86d0"]
    )


class Generated(BaseModel):
    """Images of a request, in its order."""

    images: list[str] = Field(description="PNG files in base64")
    seeds: list[int] = Field(description="with which the same images are made again", examples=[[7]])


MEANINGS = {
    401: "no API key, or a wrong one",
    408: "the body took too long",
    413: "the body is too long",
    415: "the body is of another kind",
    421: "the server was called by a name that is not this machine's",
    422: "what was sent cannot be used",
    503: "as much as the queue holds is waiting, or the server stops; ask again after Retry-After seconds",
    504: "the answer took longer than the deadline",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": meaning} for status, meaning in MEANINGS.items()
}
ERRORS[503]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
PICTURE: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"description": "a PNG file", "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
}
EVENTS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {
        "description": "server-sent events: preview {step, images}, at last images {images, seeds} or error {error}",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'event: preview\ndata: {"step": 10, "images": ["iVBORw0KGgo..."]}\n\n',
            }
        },
    },
}


def image_body() -> dict[str, Any]:
    """Return the schema of a body that is an image file."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    kinds = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
    return {"requestBody": {"required": True, "content": dict.fromkeys(kinds, binary)}}


def decode_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a body that is latents: JSON, or a latent file."""
    content = {
        "application/json": {"schema": model.model_json_schema()},
        "application/octet-stream": {
            "schema": {"type": "string", "format": "binary", "description": "a latent file of one image"}
        },
    }
    return {"requestBody": {"required": True, "content": content}}


def latents_model(models: Models) -> type[BaseModel]:
    """Return the model of a request to decode."""
    least, most = models.tokens
    dim = models.tokenizer.config.latent_dim
    number = Annotated[float, Field(ge=-LARGEST_LATENT, le=LARGEST_LATENT, allow_inf_nan=False, strict=True)]
    row = Annotated[list[number], Field(min_length=dim, max_length=dim)]
    example: Any = {"latents": [[0.0] * dim] * least, "tokenizer": models.latent_fingerprint}
    return create_model(
        "Latents",
        __config__=ConfigDict(extra="forbid", json_schema_extra={"examples": [example]}),
        latents=Annotated[list[row], Field(min_length=least, max_length=most, description="one row for each token")],
        tokenizer=(
            Annotated[str, Field(max_length=64, description="of the answer of encode; another one's is refused")]
            | None,
            None,
        ),
    )


def generate_model(models: Models, limits: Limits, *, stream: bool) -> type[BaseModel]:
    """Return the model of a request to generate.

    Args:
        models: Knows its classes.
        limits: Of images, steps, guidance and previews.
        stream: Whether previews can be asked for.

    Returns:
        A model whose `labels` are there for generators with classes alone.
    """
    assert models.pipeline is not None
    generator = models.pipeline.generator
    most = Field(min_length=1, max_length=limits.images)
    seeds = Annotated[list[Annotated[StrictInt, Field(ge=0, le=MAX_SEED)]], most]
    fields: dict[str, Any] = {
        "steps": (
            Annotated[StrictInt, Field(ge=1, le=models.most_steps(limits.steps), description="of the sampler")] | None,
            None,
        ),
        "guidance": (
            Annotated[float, Field(ge=0, le=limits.guidance, allow_inf_nan=False, strict=True, description="1 is none")]
            | None,
            None,
        ),
    }
    example: dict[str, Any] = {"seeds": [7], "steps": min(20, models.most_steps(limits.steps))}
    if generator.config.condition == "class":
        known = [{"type": "integer", "minimum": 0, "maximum": generator.config.num_classes - 1}]
        named = [{"type": "string", "enum": list(generator.classes)}] if generator.classes else []
        label = Annotated[StrictInt | StrictStr, WithJsonSchema({"anyOf": known + named})]
        fields["labels"] = (Annotated[list[label], most, Field(description="one for each image")], ...)
        fields["seeds"] = (Annotated[seeds, Field(description="one for each image; random if left out")] | None, None)
        example["labels"] = [generator.classes[0] if generator.classes else 0]
    else:
        fields["seeds"] = (Annotated[seeds, Field(description="one for each image")], ...)
    if stream:
        previews = Field(ge=1, le=limits.previews, description="at most so many, evenly over the steps")
        fields["previews"] = (Annotated[StrictInt, previews], 4)
    config = ConfigDict(extra="forbid", json_schema_extra={"examples": [example]})
    return create_model("StreamRequest" if stream else "GenerateRequest", __config__=config, **fields)


def sentence(error: ValidationError | Any) -> str:
    """Return what is wrong first, of an error with `errors()` as pydantic has them."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}"
