"""What a request asks for, read strictly: a sentence for whatever is missing, misspelt or out of range."""

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from softvq.errors import InputError

__all__ = ["MAX_JSON_BYTES", "MAX_UPLOAD_BYTES", "body_of", "json_of", "number", "text", "whole"]

MAX_UPLOAD_BYTES = 64 << 20
MAX_JSON_BYTES = 1 << 20
MAX_TEXT = 400


def text(given: Mapping[str, str], name: str) -> str:
    """Return a text of a query; an InputError says if it is missing or too long."""
    value = given.get(name)
    if value is None or len(value) > MAX_TEXT:
        raise InputError(f"{name} is missing or too long; reload the page")
    return value


def whole(given: Mapping[str, str], name: str, low: int, high: int) -> int:
    """Return a whole number of a query; an InputError says if it is none from `low` to `high`."""
    value = text(given, name)
    digits = value.removeprefix("-")
    is_whole = digits.isascii() and digits.isdigit() and len(digits) < 20
    if not is_whole or not low <= int(value) <= high:
        raise InputError(f"{name} is {value[:40]!r}, expected a whole number from {low} to {high}")
    return int(value)


def number(given: Mapping[str, str], name: str, low: float, high: float) -> float:
    """Return a number of a query; an InputError says if it is none from `low` to `high`."""
    value = text(given, name)
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not low <= found <= high:
        raise InputError(f"{name} is {value[:40]!r}, expected a number from {low:g} to {high:g}")
    return found


async def body_of(request: Request, limit: int) -> bytes:
    """Return a request's body.

    Args:
        request: Whose body was not read yet.
        limit: Most bytes.

    Returns:
        The bytes.

    Raises:
        InputError: If there are more; then the rest is not read.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise InputError(f"the file has more than {limit / 2**20:g} MiB; shrink it and drop it again")
        parts.append(part)
    return b"".join(parts)


async def json_of(request: Request) -> dict[str, Any]:
    """Return a request's JSON object; an InputError says if it holds no such thing."""
    data = await body_of(request, MAX_JSON_BYTES)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError("the request is no JSON; reload the page") from error
    if not isinstance(found, dict):
        raise InputError("the request is no JSON object; reload the page")
    return found
