"""Requests become jobs, and their results files: what stands between endpoints and models."""

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel
from starlette.requests import Request
from torch import Tensor

import softvq
from softvq.data.images import center_crop, read_image, to_image, to_tensor
from softvq.data.latents import LatentFile, latent_bytes, read_latents
from softvq.errors import InputError, RunError
from softvq.pipeline import class_numbers, keys_of_images
from softvq.serving.batching import Batcher, Group, Job
from softvq.serving.limits import Limits
from softvq.serving.metrics import Metrics
from softvq.serving.models import Models
from softvq.serving.schema import LARGEST_LATENT, MAX_SEED

__all__ = ["Gone", "Late", "Service", "png", "unforeseen"]

log = logging.getLogger("softvq.serving")


class Late(RunError):
    """The deadline has passed."""


class Gone(RunError):
    """The client went away."""


class Service:
    """Everything an endpoint needs.

    Args:
        models: What is loaded.
        limits: Of what is taken on.
    """

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits, self.metrics = models, limits, Metrics()
        self.batcher = Batcher(models.compute, most=limits.batch, wait=limits.wait, observe=self.metrics.batch)
        # few, because each may hold a large image
        self._codecs = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1), "softvq-codecs")
        self._until: float | None = None

    def finish(self) -> None:
        """Finish what is queued, for as long as the limits say from the first call on, and refuse the rest."""
        if self._until is None:
            self._until = time.monotonic() + self.limits.grace
        self.batcher.close(max(0.0, self._until - time.monotonic()))

    def close(self) -> None:
        """Finish, once no answers are to be written any more."""
        self.finish()
        self._codecs.shutdown(wait=False, cancel_futures=True)

    async def coded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run a codec in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._codecs, call, *arguments)

    async def answer(self, job: Job, request: Request) -> Any:
        """Have a job computed.

        Args:
            job: What to compute.
            request: Whose client waits for it.

        Returns:
            The result.

        Raises:
            Late: If the deadline passes.
            Gone: If the client goes away.
        """
        self.batcher.submit(job)
        future, left = asyncio.wrap_future(job.future), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({future, left}, timeout=self.limits.deadline, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            raise Gone("the client went away") if left.done() else self._late()
        finally:
            future.cancel()
            left.cancel()

    async def events(self, job: Job, seeds: list[int]) -> AsyncIterator[bytes]:
        """Submit a job, and give server-sent events: its previews, then its images or an error."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        def tell(step: int, images: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(news.put_nowait, (step, images))

        job.show = tell
        job.future.add_done_callback(lambda future: tell(0, None))
        self.batcher.submit(job)
        return self._told(job, seeds, news)

    async def _told(self, job: Job, seeds: list[int], news: "asyncio.Queue[tuple[int, Any]]") -> AsyncIterator[bytes]:
        until = time.monotonic() + self.limits.deadline
        try:
            while True:
                step, images = await asyncio.wait_for(news.get(), max(0.0, until - time.monotonic()))
                if not step:
                    break
                yield event("preview", {"step": step, "images": await self.coded(_encoded, images)})
            yield event("images", {"images": await self.coded(_encoded, job.future.result()), "seeds": seeds})
        except TimeoutError:
            yield event("error", {"error": str(self._late())})
        except (RunError, concurrent.futures.CancelledError) as error:
            yield event("error", {"error": str(error) or "the request was given up"})
        except Exception as error:
            status, said = unforeseen(error)
            if status == 500:
                log.error("a stream failed", exc_info=error)
            yield event("error", {"error": said})
        finally:
            job.future.cancel()

    def image_job(self, data: bytes, group: Group) -> Job:
        """Return the job of an image file."""
        image = read_image(data, self.limits.pixels)
        return Job(group=group, payload=to_tensor(center_crop(image, self.models.tokenizer.config.image_size)))

    def decode_job(self, latents: Float[Tensor, "token dim"]) -> Job:
        """Return the job of latents."""
        least, most = self.models.tokens
        dim = self.models.tokenizer.config.latent_dim
        if not least <= latents.shape[0] <= most or latents.shape[1] != dim:
            expected = f"[{least if least == most else f'{least} to {most}'}, {dim}]"
            raise InputError(f"latents are {list(latents.shape)}, expected {expected}")
        if not bool((latents.abs() <= LARGEST_LATENT).all()):
            raise InputError(f"latents reach {float(latents.abs().max()):g}, expected at most {LARGEST_LATENT:g}")
        return Job(group=("decode", len(latents)), payload=latents.float())

    def latents_of(self, asked: BaseModel) -> Float[Tensor, "token dim"]:
        """Return the latents of a JSON request; an InputError says if they are another tokenizer's."""
        given = getattr(asked, "tokenizer", None)
        if given is not None and given != self.models.latent_fingerprint:
            raise InputError(f"tokenizer is {given[:12]!r}, this server's is {self.models.latent_fingerprint[:12]!r}")
        return torch.tensor(asked.model_dump()["latents"])

    def latents_in(self, data: bytes) -> Float[Tensor, "token dim"]:
        """Return the latents of a latent file; an InputError says if they are not those of one image of our size."""
        content = read_latents(data, self.models.latent_fingerprint)
        size = self.models.tokenizer.config.image_size
        if content.sizes.tolist() != [[size, size]]:
            raise InputError(f"the file holds {content.sizes.tolist()[:4]}, expected one image of {size}x{size} pixels")
        return content.latents[0].float()

    def latent_file(self, latents: Float[Tensor, "token dim"]) -> bytes:
        """Return a latent file, as `softvq decode` takes it."""
        size = self.models.tokenizer.config.image_size
        content = LatentFile(
            latents=latents[None],
            names=("image",),
            sizes=torch.tensor([[size, size]]),
            fingerprint=self.models.latent_fingerprint,
            softvq_version=softvq.__version__,
        )
        return latent_bytes(content)

    def generate_job(self, asked: BaseModel) -> tuple[Job, list[int]]:
        """Return the job of a request to generate, and its seeds."""
        assert self.models.pipeline is not None
        given = asked.model_dump()
        seeds = given["seeds"]
        labels = given.get("labels") or [0] * len(seeds)
        if seeds is None:
            seeds = [secrets.randbelow(MAX_SEED) for _ in labels]
        recipe = self.models.changed_recipe(given["steps"], given["guidance"])
        payload = (class_numbers(labels, self.models.pipeline.generator), keys_of_images(seeds, len(labels)))
        shown: frozenset[int] = frozenset()
        if "previews" in given:
            count = min(given["previews"], recipe.steps)
            shown = frozenset(round((place + 1) * recipe.steps / (count + 1)) for place in range(count)) - {0}
        return Job(group=("generate", recipe), payload=payload, size=len(labels), previews=shown), seeds

    async def generated(self, images: list[Tensor], seeds: list[int]) -> dict[str, Any]:
        """Return what a request to generate is answered with."""
        return {"images": await self.coded(_encoded, images), "seeds": seeds}

    def _late(self) -> Late:
        return Late(f"the answer took more than {self.limits.deadline:g} s; ask for less, or when there is less to do")


def unforeseen(error: Exception) -> tuple[int, str]:
    """Return the status and the sentence of an error that is nobody's answer."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 503, "out of memory; ask for less, or again when there is less to do"
    return 500, "this is a mistake in softvq; the log of the server tells more"


def event(name: str, data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def png(image: Float[Tensor, "3 height width"]) -> bytes:
    """Return an image in [-1, 1] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    to_image(image).save(buffer, "PNG", compress_level=1)  # a third of the time for a tenth more bytes
    return buffer.getvalue()


def _encoded(images: list[Tensor]) -> list[str]:
    return [base64.b64encode(png(image)).decode() for image in images]
