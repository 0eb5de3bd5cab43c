"""Arguments of softvq app."""

import argparse

from softvq.arguments.shared import Commands, add_command, natural

__all__ = ["add_app"]


def add_app(commands: Commands) -> None:
    """Add app."""
    app = add_command(
        commands, "app", "app:app", "look at models in a browser: reconstructions, single tokens, new pictures, runs"
    )
    app.add_argument(
        "--tokenizer",
        default="photos-64",
        metavar="MODEL",
        help="a folder, a bundled model, or a name on the Hugging Face hub (default: photos-64)",
    )
    app.add_argument(
        "--generator",
        default="flowers-dit",
        metavar="MODEL",
        help="the same of a generator, which brings its own tokenizer; none leaves it out (default: flowers-dit)",
    )
    app.add_argument("--runs", default="runs", metavar="DIR", help="a run, or a folder of runs (default: runs)")
    app.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="what to listen on; any other than this machine's own lets others in, and there is no password "
        "(default: 127.0.0.1)",
    )
    app.add_argument("--port", type=_port, default=7860, metavar="N", help="0 takes a free one (default: 7860)")
    app.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")


def _port(text: str) -> int:
    number = natural(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, expected 0 to 65535")
    return number
