"""Judge tokenizers and generators of one kind of photographs, all of them the same way, and print one table of each.

    python benchmarks/evaluate_models.py --data FOLDER --tokenizers NAME=MODEL ... --generators NAME=MODEL ... --out OUT

`NAME` is what the table calls a model, and its folder in `OUT`. `FOLDER` holds `train` and `val`. Tokenizers are judged
by what comes back of `val`; generators by `--n` images, compared with `train`, with the figures of `val` beside.
`--features` is to be a network that none of them was trained with.
"""

import argparse
from pathlib import Path

from softvq.cli import main as softvq


def run(*arguments: str) -> None:
    """Carry out a command of softvq."""
    code = softvq(arguments)
    if code:
        raise SystemExit(code)


def named(text: str) -> tuple[str, str]:
    """Return name and model."""
    name, _, model = text.partition("=")
    if not name or not model:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=MODEL")
    return name, model


def main() -> None:
    """Evaluate all of them, and put the results side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizers", nargs="*", default=[], metavar="NAME=MODEL", type=named)
    parser.add_argument("--generators", nargs="*", default=[], metavar="NAME=MODEL", type=named)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--features", nargs="+", default=["lite2"], metavar="KIND")
    parser.add_argument("--perceptual", default="auto", help="as softvq evaluate reconstruction takes it")
    parser.add_argument("--n", default="1000", help="images of each generator")
    parser.add_argument("--guidance", nargs="+", default=["1", "2", "4"], help="scales to sample with")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    common = ["--features", *arguments.features, "--device", arguments.device, "--overwrite"]
    seen = ["--perceptual", arguments.perceptual]
    places: dict[str, list[str]] = {"tokenizer": [], "generator": []}
    for name, model in arguments.tokenizers:
        places["tokenizer"].append(str(arguments.out / name))
        photos, out = str(arguments.data / "val"), places["tokenizer"][-1]
        run("evaluate", "reconstruction", model, photos, *seen, "--out", out, *common)
    train, val = str(arguments.data / "train"), str(arguments.data / "val")
    made = ["--n", arguments.n, "--guidance", *arguments.guidance, "--validation", val, "--crop"]
    for name, model in arguments.generators:
        places["generator"].append(str(arguments.out / name))
        run("evaluate", "generation", model, train, *made, "--out", places["generator"][-1], *common)
    for kind, results in places.items():
        if results:
            run("evaluate", "compare", *results, "--out", str(arguments.out / f"{kind}s"), "--overwrite")


if __name__ == "__main__":
    main()
