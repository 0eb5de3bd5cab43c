"""Arguments of `softvq serve`."""

from softvq.arguments.shared import Commands, add_command, natural, positive

__all__ = ["add_serve"]


def add_serve(commands: Commands) -> None:
    """Add serve."""
    serve = add_command(commands, "serve", "serve:serve", "answer requests over HTTP, put together into batches")
    serve.add_argument("--tokenizer", required=True, metavar="MODEL", help="a model folder, or a name on the hub")
    serve.add_argument("--generator", metavar="MODEL", help="a generator on its latents (default: none)")
    serve.add_argument("--host", default="127.0.0.1", metavar="HOST", help="where to listen (default: 127.0.0.1)")
    serve.add_argument("--port", type=natural, default=8000, metavar="N", help="0 is any free one (default: 8000)")
    serve.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    serve.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on a GPU (default: auto)"
    )
    access = serve.add_argument_group("access")
    access.add_argument("--api-key-file", metavar="FILE", help="a key a line; requests must carry one of them")
    access.add_argument("--insecure", action="store_true", help="listen beyond this machine without an API key")
    limits = serve.add_argument_group("limits")
    limits.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images at once (default: 16)")
    limits.add_argument(
        "--wait-ms", type=float, default=5.0, metavar="MS", help="how long a batch waits for more (default: 5)"
    )
    limits.add_argument("--queue", type=positive, default=64, metavar="N", help="requests taken on (default: 64)")
    limits.add_argument("--deadline", type=float, default=60.0, metavar="S", help="of an answer (default: 60)")
    limits.add_argument("--grace", type=float, default=30.0, metavar="S", help="to finish when stopped (default: 30)")
    limits.add_argument("--max-body-mib", type=positive, default=8, metavar="N", help="of a request (default: 8)")
    limits.add_argument(
        "--max-pixels", type=positive, default=16_000_000, metavar="N", help="of an image (default: 16000000)"
    )
    limits.add_argument("--max-images", type=positive, default=8, metavar="N", help="of a request (default: 8)")
    limits.add_argument("--max-steps", type=positive, default=100, metavar="N", help="of a sampler (default: 100)")
