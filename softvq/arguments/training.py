"""Arguments of commands that train models and prepare for it."""

import argparse

from softvq.arguments.shared import Commands, add_command, add_machine, add_model, natural, positive

__all__ = ["add_cache", "add_compare", "add_train"]


def add_cache(commands: Commands) -> None:
    """Add cache-latents."""
    cache = add_command(
        commands, "cache-latents", "cache:cache_latents", "turn photographs into a cache to train generators on"
    )
    add_model(cache)
    cache.add_argument("data", metavar="DATA", help="a folder of photographs, tar shards, or hf:NAME")
    cache.add_argument("out", metavar="OUT", help="the folder of the cache; one that was interrupted is gone on with")
    cache.add_argument(
        "--shard-size", type=positive, default=4096, metavar="N", help="photographs a file (default: 4096)"
    )
    cache.add_argument("--no-flip", action="store_false", dest="flip", help="leave out the mirrored photographs")
    cache.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="how latents are stored (default: float16)"
    )
    cache.add_argument(
        "--size", type=positive, metavar="N", help="centre-crop to N x N (default: the model's image size)"
    )
    cache.add_argument(
        "--tokens", type=positive, metavar="N", help="of a nested tokenizer, the first so many (default: all)"
    )
    cache.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="processes that decode ahead (default: 0)"
    )
    add_machine(cache)


def add_train(commands: Commands) -> None:
    """Add train tokenizer and train generator."""
    train = commands.add_parser("train", help="train a model", description="Train a model.")
    kinds = train.add_subparsers(title="models", metavar="KIND", required=True, dest="kind")
    tokenizer = add_command(
        kinds, "tokenizer", "train:train_tokenizer", "train an image tokenizer on a folder of photographs"
    )
    _run(tokenizer)
    generator = add_command(kinds, "generator", "train:train_generator", "train a generator on a tokenizer's latents")
    generator.add_argument("--latents", metavar="DIR", help="a cache of latents, made with softvq cache-latents")
    generator.add_argument("--tokenizer", metavar="MODEL", help="the tokenizer (default: the one the cache names)")
    _run(generator)


def add_compare(commands: Commands) -> None:
    """Add compare."""
    compare = add_command(
        commands, "compare", "curves:compare_runs", "draw the curves of several runs over one another"
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a folder that softvq train wrote")
    compare.add_argument("--out", default="compare.png", metavar="FILE", help="the picture (default: compare.png)")
    compare.add_argument("--overwrite", action="store_true", help="replace FILE")
    compare.add_argument("--keys", nargs="+", metavar="NAME", help="of the log (default: all that every run has)")
    compare.add_argument(
        "--smooth", type=positive, default=1, metavar="N", help="average each value with the N - 1 before (default: 1)"
    )


def _run(train: argparse.ArgumentParser) -> None:
    train.add_argument("--config", required=True, metavar="FILE", help="the recipe, a YAML file")
    train.add_argument(
        "--data",
        metavar="DATA",
        help="a folder of photographs, tar shards, or hf:NAME (default: data.path of the recipe)",
    )
    train.add_argument("--run", metavar="DIR", dest="run_dir", help="where to write (default: runs/NAME of recipe)")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of --run")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and sizes, try every phase for a few updates on noise, write nothing",
    )
    train.add_argument("--device", metavar="NAME", help="auto, cpu or cuda (default: as the recipe says)")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the recipe, e.g. seed=1")
