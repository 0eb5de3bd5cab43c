"""Who may speak to the app: the page it served, and nobody on behalf of another web site."""

import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["HEADERS", "Guard", "refusal"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Go with every answer: the page loads nothing from elsewhere, and no other page can frame or read it."""


class Guard:
    """Refuses requests that another web site may have caused, before anything reads them, and sets `HEADERS`.

    A site can point a name of its own at 127.0.0.1 and so speak to servers there as if they were its own (DNS
    rebinding). Such a request carries that name as its host, so only addresses, `localhost` and the name that the app
    was started with are answered. A site that asks across origins is given away by `Origin` or `Sec-Fetch-Site`.

    Args:
        app: What is guarded, an ASGI application.
        host: The name or address that the app was started with.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], host: str) -> None:
        self.app, self.host = app, host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safely(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        sentence = refusal(scope["headers"], self.host, scope["path"] == "/" and scope["method"] == "GET")
        if sentence is None:
            await self.app(scope, receive, send_safely)
            return
        body = json.dumps({"error": sentence}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send_safely({"type": "http.response.start", "status": 403, "headers": headers})
        await send_safely({"type": "http.response.body", "body": body})


def refusal(headers: list[tuple[bytes, bytes]], host: str, is_page: bool) -> str | None:
    """Return why a request is refused, or None if it may go on.

    Args:
        headers: Of the request, names in lower case.
        host: The name or address that the app was started with.
        is_page: Whether the page itself is asked for, to which other sites may link.

    Returns:
        A sentence, or nothing.
    """
    found: dict[bytes, list[str]] = {}
    for name, value in headers:
        found.setdefault(name, []).append(value.decode("latin-1").strip())
    hosts = found.get(b"host", [])
    if len(hosts) != 1 or not _is_ours(hosts[0], host):
        return "the app answers to its address only; open the address that it printed"
    origins = found.get(b"origin", [])
    if any(origin.partition("://")[2].lower() != hosts[0].lower() for origin in origins):
        return "the app answers to its own page only; open the address that it printed"
    sites = found.get(b"sec-fetch-site", [])
    if not is_page and any(site not in {"same-origin", "none"} for site in sites):
        return "the app answers to its own page only; open the address that it printed"
    return None


def _is_ours(given: str, host: str) -> bool:
    """Tell whether a `Host` header names an address, which no site can point elsewhere, or a name that is ours."""
    name = given.lower()
    before, colon, port = name.rpartition(":")
    if colon and port.isascii() and port.isdigit():
        name = before
    if name in {"localhost", host}:
        return True
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True
