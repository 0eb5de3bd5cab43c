"""Models in a browser: `softvq app`."""

import argparse
import importlib.util
import ipaddress
from collections import Counter
from pathlib import Path

from softvq.app.photographs import Bundled
from softvq.app.studio import Studio
from softvq.commands.common import load_tokenizer, messages, results
from softvq.commands.demo_photos import ASSETS, credits_of_photos, photos_of
from softvq.data.images import find_images
from softvq.errors import InputError
from softvq.pipeline import GenerationPipeline
from softvq.training.distributed import choose_device

__all__ = ["app", "bundled_photographs"]


def app(arguments: argparse.Namespace) -> None:
    """Serve a page that shows models at work, until it is stopped."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the app needs {' and '.join(missing)}; run: pip install 'softvq[serve]'")
    from softvq.app import server
    from softvq.serving.server import address_of, listen

    host = arguments.host
    with listen(host, arguments.port) as listening:
        device = choose_device(arguments.device)
        with messages().status("loading the models"):
            tokenizer = load_tokenizer(arguments.tokenizer, device)
            pipeline = None
            if arguments.generator != "none":
                pipeline = GenerationPipeline.from_pretrained(arguments.generator).to(device)
            studio = Studio(tokenizer, pipeline, bundled_photographs(), (arguments.tokenizer, arguments.generator))
            studio.about()
        if not _is_loopback(host):
            messages().print(f"{host}: others can reach this; whoever does may use it, there is no password")
        results().print(f"softvq app: {address_of(listening)} (Ctrl-C stops it)", soft_wrap=True)
        server.server_of(server.build(studio, Path(arguments.runs), host)).run(sockets=[listening])


def bundled_photographs() -> list[Bundled]:
    """Return the held-out photographs of the package."""
    credits, seen, found = credits_of_photos(), Counter[str](), []
    for path in find_images(photos_of("val")):
        kind = path.parent.name
        seen[kind] += 1
        name = kind if seen[kind] == 1 else f"{kind} {seen[kind]}"
        credit = credits.get(path.relative_to(ASSETS / "photos").as_posix(), "")
        found.append(Bundled(path=path, name=name, credit=credit))
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
