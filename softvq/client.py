"""A client of `softvq serve` that needs nothing but Python."""

import base64
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softvq.errors import InputError, RunError

__all__ = ["Client"]

ATTEMPTS = 8
MAX_WAIT = 60.0


class Client:
    """Asks a server for reconstructions, latents and images, again where it answers that it has too much to do.

        client = Client("http://127.0.0.1:8000")
        Path("reconstruction.png").write_bytes(client.reconstruct(Path("photo.jpg")))

    Args:
        address: Of the server.
        api_key: If it needs one.
        timeout: Seconds for an answer.
        attempts: Times to ask while the server answers 503, waiting as long as it says in between.
    """

    def __init__(
        self, address: str, *, api_key: str | None = None, timeout: float = 120.0, attempts: int = ATTEMPTS
    ) -> None:
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            raise InputError(f"address is {address!r}, expected one such as http://127.0.0.1:8000")
        self._address, self._timeout, self._attempts = address.rstrip("/"), timeout, attempts
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # straight to the server: proxies of the environment are for other hosts
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def models(self) -> dict[str, Any]:
        """Return what the server has loaded, and its limits."""
        return json.loads(self._ask("/v1/models"))

    def reconstruct(self, image: Path | bytes, tokens: int | None = None) -> bytes:
        """Return an image from its tokens.

        Args:
            image: A JPEG, PNG or WebP file, or the bytes of one.
            tokens: Decode so many of the first tokens; all by default.

        Returns:
            A PNG file.

        Raises:
            InputError: If the server refuses the image.
            RunError: If the server cannot be reached, fails, or has too much to do.
        """
        query = "" if tokens is None else f"?tokens={tokens}"
        return self._ask(f"/v1/reconstruct{query}", _bytes(image), "application/octet-stream")

    def encode(self, image: Path | bytes) -> list[list[float]]:
        """Return the latents of an image, one row for each token; arguments and errors are those of `reconstruct`."""
        return json.loads(self._ask("/v1/encode", _bytes(image), "application/octet-stream"))["latents"]

    def decode(self, latents: Sequence[Sequence[float]]) -> bytes:
        """Return the image of latents as a PNG file; errors are those of `reconstruct`."""
        rows = [[float(number) for number in row] for row in latents]
        return self._ask("/v1/decode", json.dumps({"latents": rows}).encode())

    def generate(
        self,
        labels: Sequence[int | str] | None,
        seeds: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[bytes]:
        """Return new images.

        Args:
            labels: A class for each image, by name or number; None for a generator without classes.
            seeds: One for each image, which make the same image again; random by default.
            steps: Of the sampler; by default the generator's own.
            guidance: Scale of guidance; by default the generator's own.

        Returns:
            PNG files.

        Raises:
            InputError: If the server refuses the request.
            RunError: If the server cannot be reached, fails, or has too much to do.
        """
        if isinstance(labels, str):
            raise InputError(f"labels is {labels!r}, expected one for each image: [{labels!r}]")
        asked = {"labels": labels, "seeds": seeds, "steps": steps, "guidance": guidance}
        given = {
            name: list(value) if isinstance(value, Sequence) else value
            for name, value in asked.items()
            if value is not None
        }
        answer = json.loads(self._ask("/v1/generate", json.dumps(given).encode()))
        return [base64.b64decode(image) for image in answer["images"]]

    def _ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        """Return the body of an answer, asking again on 503."""
        headers = self._headers if body is None else {**self._headers, "Content-Type": kind}
        request = urllib.request.Request(self._address + path, body, headers)
        for attempt in range(1, self._attempts + 1):
            try:
                with self._opener.open(request, timeout=self._timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    sentence = _sentence(error)
                    if error.code != 503 or attempt == self._attempts:
                        kind_of_error = InputError if 400 <= error.code < 500 else RunError
                        raise kind_of_error(f"{self._address}{path}: {sentence}") from error
                    wait = error.headers.get("Retry-After", "")
                time.sleep(min(MAX_WAIT, float(wait) if wait.isdigit() else 2.0 ** (attempt - 1)))
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                raise RunError(f"{self._address}: does not answer ({reason}); check the address") from error
        raise RunError(f"{self._address}: attempts is {self._attempts}, expected at least 1")


def _bytes(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise InputError(f"{image}: cannot be read ({error.strerror or error})") from error


def _sentence(error: urllib.error.HTTPError) -> str:
    """Return what a server says is wrong, or the status if something else than softvq answered."""
    try:
        return str(json.loads(error.read(1 << 16))["error"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return f"answered {error.code} {error.reason}"
