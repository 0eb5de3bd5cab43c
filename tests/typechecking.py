"""How signatures are checked while tests run: by beartype, as late and as seldom as finds the same."""

from collections.abc import Callable
from typing import Any

from beartype import beartype

__all__ = ["checked"]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that checks what it is called with, for jaxtyping.

    Of each function jaxtyping makes two: one that takes the arguments, before, and one that takes them and the result,
    after. Both know the same sizes of dimensions, so the second, which alone has a result, leaves the arguments to the
    first. Each is compiled at its first call: most functions are never called by one worker.
    """
    result = function.__annotations__.get("return", Any)
    if result is not Any:
        function.__annotations__ = {"return": result}
    compiled: list[Callable[..., Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(beartype(function))
        return compiled[0](*args, **kwargs)

    return call
