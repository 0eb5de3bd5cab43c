"""Models over HTTP: `softvq serve`."""

import argparse
import importlib.util
import sys

from softvq.commands.common import machine_name, results
from softvq.errors import InputError
from softvq.training.distributed import choose_device

__all__ = ["serve"]

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(arguments: argparse.Namespace) -> None:
    """Load models and answer requests until SIGTERM or SIGINT."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"softvq serve needs {', '.join(missing)}; pip install 'softvq[serve]'")
    from softvq.serving.app import create_app
    from softvq.serving.keys import is_loopback, read_api_keys
    from softvq.serving.limits import Limits
    from softvq.serving.models import Models
    from softvq.serving.server import address_of, listen, log_to
    from softvq.serving.server import serve as answer

    loopback = is_loopback(arguments.host)
    if not loopback and not arguments.api_key_file and not arguments.insecure:
        raise InputError(
            f"--host is {arguments.host}, which others can reach; give --api-key-file, or --insecure to let anybody in"
        )
    keys = read_api_keys(arguments.api_key_file) if arguments.api_key_file else None
    device = choose_device(arguments.device)
    limits = Limits(
        batch=arguments.batch_size,
        wait=arguments.wait_ms / 1000,
        queue=arguments.queue,
        body_bytes=arguments.max_body_mib << 20,
        pixels=arguments.max_pixels,
        images=min(arguments.max_images, arguments.batch_size),
        steps=arguments.max_steps,
        deadline=arguments.deadline,
        grace=arguments.grace,
    )
    made = listen(arguments.host, arguments.port)
    with made:
        models = Models.load(arguments.tokenizer, arguments.generator, device=device, precision=arguments.precision)
        if models.pipeline is not None and models.recipe.steps > models.most_steps(limits.steps):
            raise InputError(
                f"--max-steps is {limits.steps}, but the generator's recipe takes {models.recipe.steps}; allow those"
            )
        app = create_app(models, limits, keys=keys, local=loopback and keys is None)
        log_to(sys.stderr)
        results().print(f"softvq serves at {address_of(made)} on {machine_name(device)}", soft_wrap=True)
        answer(app, made, limits)
        results().print("softvq has stopped", soft_wrap=True)
