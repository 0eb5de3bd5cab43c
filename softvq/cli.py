"""The `softvq` program: it reads the command line, calls one function of `softvq.commands`, and ends with an exit code.

Nothing heavy is imported here: `softvq --help` answers before torch would have been found.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from softvq import __version__
from softvq.errors import InputError, Interrupted, RunError

__all__ = ["main"]

EPILOG = """\
exit codes: 0 done, 2 bad input, 3 failed midway, 75 interrupted and resumable
MODEL is a folder written by softvq, or a name on the Hugging Face hub such as SoftVQVAE/softvq-l-64
"""
SAMPLERS = ("euler", "heun", "ab2", "euler_maruyama", "dpm++", "dpm++_sde", "ddpm", "ddim")
Commands = argparse._SubParsersAction  # argparse gives this type no public name


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
        return RunError.exit_code, "a data worker died, often for want of memory; lower num_workers and resume"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
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


class _Parser(argparse.ArgumentParser):
    """Complains in one sentence like everything else here, and never guesses what an abbreviation meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="softvq",
        description="Turn images into a few continuous tokens and back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"softvq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    _add_images(commands)
    _add_cache(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_model(commands)
    _add_others(commands)
    return parser


def _add_images(commands: Commands) -> None:
    encode = _add(commands, "encode", "images:encode", "turn a photograph or a folder of them into a latent file")
    _model(encode)
    _photos(encode)
    encode.add_argument("out", metavar="OUT", help="the latent file to write, NAME.safetensors")
    encode.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="how latents are stored (default: float16)"
    )
    decode = _add(commands, "decode", "images:decode", "turn a latent file back into PNG files")
    _model(decode)
    decode.add_argument("latents", metavar="LATENTS", help="a file written by softvq encode with the same MODEL")
    decode.add_argument("out", metavar="OUT_DIR", help="the folder to write PNG files into")
    reconstruct = _add(
        commands,
        "reconstruct",
        "images:reconstruct",
        "encode and decode photographs; pictures, PSNR, SSIM",
    )
    _model(reconstruct)
    _photos(reconstruct)
    reconstruct.add_argument(
        "out", metavar="OUT", help="the folder to write to: pictures, metrics.json, of a folder also contact-sheet.png"
    )
    for command in (encode, decode, reconstruct):
        _machine(command)
        command.add_argument("--overwrite", action="store_true", help="write although something is there already")


def _add_cache(commands: Commands) -> None:
    cache = _add(
        commands, "cache-latents", "cache:cache_latents", "turn photographs into a cache to train generators on"
    )
    _model(cache)
    cache.add_argument("data", metavar="DATA", help="the folder of photographs; its subfolders are the classes")
    cache.add_argument("out", metavar="OUT", help="the folder of the cache; one that was interrupted is gone on with")
    cache.add_argument(
        "--shard-size", type=_positive, default=4096, metavar="N", help="photographs a file (default: 4096)"
    )
    cache.add_argument("--no-flip", action="store_false", dest="flip", help="leave out the mirrored photographs")
    cache.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="how latents are stored (default: float16)"
    )
    cache.add_argument(
        "--size", type=_positive, metavar="N", help="centre-crop to N x N (default: the model's image size)"
    )
    cache.add_argument(
        "--workers", type=_natural, default=0, metavar="N", help="processes that decode ahead (default: 0)"
    )
    _machine(cache)


def _add_train(commands: Commands) -> None:
    train = commands.add_parser("train", help="train a model", description="Train a model.")
    kinds = train.add_subparsers(title="models", metavar="KIND", required=True, dest="kind")
    tokenizer = _add(kinds, "tokenizer", "train:train_tokenizer", "train an image tokenizer on a folder of photographs")
    _run(tokenizer)
    generator = _add(kinds, "generator", "train:train_generator", "train a generator on a tokenizer's latents")
    generator.add_argument("--latents", metavar="DIR", help="a cache of latents, made with softvq cache-latents")
    generator.add_argument("--tokenizer", metavar="MODEL", help="the tokenizer (default: the one the cache names)")
    _run(generator)


def _run(train: argparse.ArgumentParser) -> None:
    train.add_argument("--config", required=True, metavar="FILE", help="the recipe, a YAML file")
    train.add_argument("--data", metavar="DIR", help="the folder of photographs (default: data.path of the recipe)")
    train.add_argument("--run", metavar="DIR", dest="run_dir", help="where to write (default: runs/NAME of recipe)")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of --run")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and sizes, try every phase for a few updates on noise, write nothing",
    )
    train.add_argument("--device", metavar="NAME", help="auto, cpu or cuda (default: as the recipe says)")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the recipe, e.g. seed=1")


def _add_sample(commands: Commands) -> None:
    sample = _add(commands, "sample", "sample:sample", "make images with a generator: PNG files, a grid, an .npz file")
    sample.add_argument("model", metavar="MODEL", help="a generator's folder, or a name on the Hugging Face hub")
    sample.add_argument("out", metavar="OUT", help="the folder to write to")
    sample.add_argument("--classes", metavar="A,B,...", help="names or numbers, taken in turn (default: all)")
    sample.add_argument("--n", type=_positive, default=16, metavar="N", help="images in all (default: 16)")
    sample.add_argument("--seed", type=int, default=0, help="the same seed makes the same images (default: 0)")
    stored = "(default: as stored with the model)"
    sample.add_argument("--sampler", choices=SAMPLERS, help=f"how noise becomes latents {stored}")
    sample.add_argument("--steps", type=int, metavar="N", help=f"steps of the sampler {stored}")
    sample.add_argument("--head-steps", type=int, metavar="N", help=f"steps of MAR's head {stored}")
    sample.add_argument("--shift", type=float, metavar="X", help=f"shift of a flow's times to the noisy end {stored}")
    sample.add_argument("--temperature", type=float, metavar="X", help=f"deviation of the noise {stored}")
    sample.add_argument("--guidance", type=float, metavar="X", help=f"guidance scale, 1 is none {stored}")
    sample.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=f"where it acts, 0 to 1 {stored}"
    )
    sample.add_argument(
        "--guidance-schedule", choices=("constant", "linear", "cosine"), help=f"how it grows towards the data {stored}"
    )
    sample.add_argument("--guide", metavar="MODEL", help="a worse generator to guide away from (autoguidance)")
    sample.add_argument("--tokenizer", metavar="MODEL", help="the tokenizer, if it is not where the model says")
    sample.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="images at once (default: 64)")
    sample.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    sample.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on a GPU (default: auto)"
    )
    sample.add_argument("--compile", action="store_true", help="compile the networks: a slow start, then faster")
    sample.add_argument("--overwrite", action="store_true", help="write although something is there already")


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a model", description="Measure a model.")
    kinds = evaluate.add_subparsers(title="figures", metavar="WHAT", required=True, dest="kind")
    probe = _add(kinds, "probe", "evaluate:probe", "see how well classes can be told from latents or features")
    _measured(probe, "folders train and val of photographs, each with a subfolder for every class")
    probe.add_argument("--val", metavar="DIR", help="what to judge by; DATA is then what to learn from")
    probe.add_argument(
        "--on",
        default="latents-pooled",
        metavar="FEATURES",
        help="latents-pooled, latents, encoder, or generator:LAYER (default: latents-pooled)",
    )
    probe.add_argument("--generator", metavar="DIR", help="a generator on this tokenizer's latents")
    probe.add_argument("--time", type=float, default=0.2, help="noise a generator sees, 0 to 1 (default: 0.2)")
    probe.add_argument("--knn", type=_positive, default=20, metavar="K", help="neighbours that vote (default: 20)")
    probe.add_argument("--out", metavar="DIR", help="write probe.json into this folder")
    latents = _add(kinds, "latents", "evaluate:latents", "report what latents look like: a page and report.json")
    _measured(latents, "a folder of photographs; its subfolders are the classes")
    latents.add_argument(
        "--features", nargs="+", metavar="NAME", help="a vision encoder to compare with: a timm model, its weights"
    )
    latents.add_argument(
        "--out", default="latent-report", metavar="DIR", help="the folder to write to (default: latent-report)"
    )


def _measured(command: argparse.ArgumentParser, data: str) -> None:
    _model(command)
    command.add_argument("data", metavar="DATA", help=data)
    command.add_argument(
        "--images", type=_positive, default=2048, metavar="N", help="at most so many, spread evenly (default: 2048)"
    )
    command.add_argument("--size", type=_positive, metavar="N", help="centre-crop to N x N (default: the model's)")
    command.add_argument("--overwrite", action="store_true", help="write although something is at --out already")
    _machine(command)


def _add_model(commands: Commands) -> None:
    inspect = _add(commands, "inspect", "inspect:inspect", "show a model: parameters, tokens, FLOPs, latent statistics")
    _model(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON for programs instead of tables")
    stats = _add(commands, "fit-stats", "stats:fit_stats", "fit what normalises latents on photographs, save it")
    _model(stats)
    _photos(stats, name="DATA")
    stats.add_argument("--per-channel", action="store_true", help="one mean and deviation per channel, not one for all")
    stats.add_argument("--out", metavar="DIR", help="save the model here (default: the folder MODEL itself)")
    stats.add_argument("--overwrite", action="store_true", help="write although something is at --out already")
    _machine(stats)
    average = _add(commands, "average", "average:average", "save a run's model with a longer or shorter average")
    average.add_argument("run_dir", metavar="RUN", help="the folder of a finished run that kept other averages")
    which = average.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--length",
        type=float,
        metavar="L",
        help="put together from those of train.ema_lengths: the profile's deviation as a fraction of the run, 0.001 to "
        "0.288",
    )
    which.add_argument("--decay", type=float, metavar="D", help="one of train.more_ema_decays, as it is")
    average.add_argument("--out", required=True, metavar="DIR", help="save the model here")
    average.add_argument("--overwrite", action="store_true", help="write although something is at --out already")


def _add_others(commands: Commands) -> None:
    _add(commands, "doctor", "doctor:doctor", "show what is installed, which devices there are, and what will be slow")
    demo = _add(commands, "demo", "demo:demo", "train a tiny tokenizer on bundled photographs and show what it learned")
    demo.add_argument("--out", default="softvq-demo", metavar="DIR", help="where to write (default: softvq-demo)")
    demo.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="train so many steps instead of the recipe's, which take about two minutes",
    )
    demo.add_argument("--seed", type=int, default=0, help="what all randomness derives from (default: 0)")
    demo.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    _add(commands, "version", "version:version", "print the version")


def _add(commands: Commands, name: str, run: str, sentence: str) -> argparse.ArgumentParser:
    description = f"{sentence[0].upper()}{sentence[1:]}."
    command = commands.add_parser(name, help=sentence, description=description)
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a model folder, or a name on the Hugging Face hub")


def _photos(command: argparse.ArgumentParser, name: str = "PHOTO|DIR") -> None:
    command.add_argument("photos", metavar=name, help="a photograph, or a folder searched for them (JPEG, PNG, WebP)")
    command.add_argument(
        "--size",
        metavar="native|N|HxW",
        help="scale and centre-crop to this size, or keep each photograph's own (default: the model's image size)",
    )


def _machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    command.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of the networks (default: float32)"
    )
    command.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="images at once (default: 16)")


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
