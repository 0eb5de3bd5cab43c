"""The `softvq` program: it reads the command line, calls one function of `softvq.commands`, and ends with an exit code.

Nothing heavy is imported here: `softvq --help` answers before torch would have been found.
"""

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from softvq import __version__
from softvq.arguments.app import add_app
from softvq.arguments.codec import add_codec
from softvq.arguments.data import add_data
from softvq.arguments.evaluation import add_evaluate
from softvq.arguments.export import add_export
from softvq.arguments.images import add_images, add_tokenizers
from softvq.arguments.others import add_others
from softvq.arguments.sampling import add_sample
from softvq.arguments.serving import add_serve
from softvq.arguments.shared import Parser
from softvq.arguments.speed import add_bench, add_estimate
from softvq.arguments.training import add_cache, add_compare, add_train
from softvq.errors import InputError, Interrupted, RunError

__all__ = ["main"]

UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ, errno.ENOTDIR, errno.EACCES)
"""What is wrong with a name that was given, not with work that began well."""

EPILOG = """\
exit codes: 0 done, 2 bad input, 3 failed midway, 75 interrupted and resumable
MODEL is a folder written by softvq, or a name on the Hugging Face hub such as SoftVQVAE/softvq-l-64
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: What follows `softvq` on the command line; None reads `sys.argv`.

    Returns:
        The exit code: 0 done, 1 a mistake of ours, 2 bad input, 3 failed midway, 75 interrupted but resumable,
        130 stopped by the keyboard, 141 the reader of our output went away.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        choices = _read(given)
        _command(choices.run)(choices)
        _flush()
        return 0
    except SystemExit as ended:  # argparse after --help and --version
        return ended.code if isinstance(ended.code, int) else 0
    except BrokenPipeError:
        _silence_stdout()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _say("stopped by the keyboard")
        return 128 + signal.SIGINT
    except Exception as error:
        if debug:
            raise
        code, sentence = _explain(error)
        _say(sentence)
        return code


def _explain(error: Exception) -> tuple[int, str]:
    """Give the exit code and the sentence that belong to an error."""
    if isinstance(error, InputError | RunError | Interrupted):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without its import
        return RunError.exit_code, "out of memory; give a smaller --batch-size or --size, or another --device"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):  # from torch's signal handler
        return RunError.exit_code, "a data worker died, often for want of memory; lower --workers and go on"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        if name and error.errno in UNUSABLE:
            return InputError.exit_code, f"{name}cannot be used ({error.strerror}); check the name and its permissions"
        return RunError.exit_code, f"{name}{error.strerror or error}"
    return 1, (
        f"{type(error).__name__}: {error} - this is a mistake in softvq, please report it; "
        "run the same command with --debug added to see where it happened"
    )


def _say(sentence: str) -> None:
    text = "".join(char if char.isprintable() else " " for char in sentence)  # a file's name may hold anything
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"softvq: {' '.join(text.split())}\n")
        sys.stderr.flush()


def _flush() -> None:
    """Write out what was printed while an error can still be told."""
    try:
        sys.stdout.flush()
    except OSError:
        _silence_stdout()
        raise


def _silence_stdout() -> None:
    """Point stdout at nothing, so that Python's own flush at exit does not fail a second time."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    module, function = name.split(":")
    return getattr(importlib.import_module(f"softvq.commands.{module}"), function)


def _read(given: list[str]) -> argparse.Namespace:
    """Parse the command line; KEY=VALUE overrides may stand anywhere, which argparse alone does not allow."""
    parser = _parser()
    choices, rest = parser.parse_known_args(given)
    for text in rest:
        if text.startswith("-") or not hasattr(choices, "overrides"):
            parser.error(f"{text!r} is no argument of this command")
        choices.overrides.append(text)
    return choices


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="softvq",
        description="Turn images into a few continuous tokens and back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"softvq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    add_images(commands)
    add_data(commands)
    add_codec(commands)
    add_cache(commands)
    add_train(commands)
    add_compare(commands)
    add_estimate(commands)
    add_sample(commands)
    add_evaluate(commands)
    add_serve(commands)
    add_tokenizers(commands)
    add_export(commands)
    add_app(commands)
    add_bench(commands)
    add_others(commands)
    return parser
