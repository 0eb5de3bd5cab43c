"""What several commands take: the parser, models, photographs, machines, whole numbers."""

import argparse
from typing import Any, NoReturn

from softvq.errors import InputError

__all__ = ["Commands", "Parser", "add_command", "add_machine", "add_model", "add_photos", "natural", "positive"]

Commands = argparse._SubParsersAction  # argparse gives this type no public name


class Parser(argparse.ArgumentParser):
    """Complains in one sentence like everything else here, and never guesses what an abbreviation meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as an InputError; argparse would print and exit."""
        raise InputError(f"{message}; see {self.prog} --help")


def add_command(commands: Commands, name: str, run: str, sentence: str) -> argparse.ArgumentParser:
    """Add a command: its name, the `module:function` of softvq.commands that it calls, and what it does."""
    description = f"{sentence[0].upper()}{sentence[1:]}."
    command = commands.add_parser(name, help=sentence, description=description)
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    """Take a tokenizer."""
    command.add_argument("model", metavar="MODEL", help="a model folder, or a name on the Hugging Face hub")


def add_photos(command: argparse.ArgumentParser, name: str = "PHOTO|DIR") -> None:
    """Take photographs, and the size to bring them to."""
    command.add_argument("photos", metavar=name, help="a photograph, or a folder searched for them (JPEG, PNG, WebP)")
    command.add_argument(
        "--size",
        metavar="native|N|HxW",
        help="scale and centre-crop to this size, or keep each photograph's own (default: the model's image size)",
    )


def add_machine(command: argparse.ArgumentParser, batch_size: int = 16, *, fp8: bool = False) -> None:
    """Take device, precision and batch size."""
    command.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    choices, where = (("float32", "bf16", "fp8"), ", fp8 on CUDA alone") if fp8 else (("float32", "bf16"), "")
    command.add_argument(
        "--precision", choices=choices, default="float32", help=f"of the networks{where} (default: float32)"
    )
    command.add_argument(
        "--batch-size", type=positive, default=batch_size, metavar="N", help=f"images at once (default: {batch_size})"
    )


def natural(text: str) -> int:
    """Read a whole number from 0."""
    return 0 if text == "0" else positive(text)


def positive(text: str) -> int:
    """Read a whole number from 1; argparse tells what is wrong with any other text."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
