"""What an experiment asks for: its YAML, its cells, and the jobs that they need."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from softvq.commands.train import read_recipe
from softvq.config import apply_overrides, from_dict, read_yaml, to_yaml
from softvq.errors import InputError
from softvq.training.generator_recipe import GeneratorRunConfig, expand_generator

__all__ = [
    "DEVICE",
    "FIGURES",
    "LATENTS",
    "Cell",
    "Experiment",
    "Job",
    "Options",
    "Plot",
    "build_jobs",
    "read_experiment",
]

DEVICE = "{device}"
"""Stands in commands for the device, which is known when a job starts and changes nothing that is asked."""
GENERATOR, CELL = "generator.", "cell:"
LATENTS = "latents"
"""Folder, in OUT, of the jobs whose latents others share."""
OWN = "{own}"
"""Stands in commands for the job's folder, which is named after what they do."""
REFERENCE = "reference"
"""Folder, in OUT, of what networks see in the training photographs, for all generators."""
SHOWN = 16
"""Digits of that name."""
FIGURES = {
    "reconstruction.psnr": "PSNR in dB",
    "reconstruction.ssim": "SSIM",
    "reconstruction.st_lpips": "ST-LPIPS",
    "reconstruction.frechet_distance": "Fréchet distance of reconstructions",
    "reconstruction.codebook_usage": "share of codewords in use",
    "reconstruction.codebook_perplexity": "perplexity of the mean posterior, in codewords",
    "reconstruction.posterior_entropy": "entropy of a token's posterior in nats",
    "probe.linear": "accuracy of the linear probe",
    "probe.knn": "accuracy of the nearest neighbours",
    "generation.frechet_distance": "Fréchet distance of samples",
    "generation.precision": "precision of samples",
    "generation.recall": "recall of samples",
    "generation.nearest_distance": "median distance to the nearest photograph, 1 - cos",
    "training.perplexity": "perplexity in training, in codewords",
    "training.posterior_entropy": "entropy of a token's posterior in training, in nats",
    "training.seconds": "training the tokenizer, in s",
    "training.images_per_sec": "training the tokenizer, in images/s",
    "generator.seconds": "training the generator, in s",
    "generator.images_per_sec": "training the generator, in images/s",
}
"""What the table shows and plots may name, with units; `results.json` has more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One picture."""

    x: str
    """An axis, or a figure."""
    y: str
    """A figure, one of FIGURES."""
    lines: str | None = None
    """An axis, each of whose levels is a line."""
    log_x: bool = False
    """Space x by its logarithm."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The fields of an experiment's YAML beside `axes` and `common`."""

    title: str
    """What tables and pictures are called."""
    question: str
    """What is to be found out."""
    expected: str
    """What the paper would have one expect."""
    recipe: str
    """The tokenizer's recipe, relative to the YAML."""
    generator: str | None = None
    """The generator's recipe, relative to the YAML."""
    skip: tuple[tuple[str, ...], ...] = ()
    """Levels of which cells that have all are left out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, order and noise; each is a job."""
    once: tuple[tuple[str, ...], ...] = ()
    """Levels of which cells that have all are trained with the first seed alone."""
    measure: tuple[Literal["reconstruction", "probe", "generation"], ...] = ("reconstruction",)
    """What is evaluated."""
    guidance: float = 1.0
    """Guidance scale of the samples; 1 is none."""
    plots: tuple[Plot, ...] = ()
    """Pictures at the end."""

    def __post_init__(self) -> None:
        """Refuse what cannot be carried out."""
        if ("generation" in self.measure) != (self.generator is not None):
            raise InputError("generator and 'generation' in measure belong together; give both or neither")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds is {list(self.seeds)}, expected at least one, and each once")
        for plot in self.plots:
            if plot.y not in FIGURES:
                raise InputError(f"plots: y is {plot.y!r}, expected one of {', '.join(FIGURES)}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One level of every axis."""

    levels: Mapping[str, str]
    """Name of the level, by axis."""
    fields: Mapping[str, Any]
    """What the levels set, by the dotted names of recipe fields."""

    @property
    def name(self) -> str:
        """Return its name, for people and `--only`."""
        return ", ".join(self.levels.values())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """An experiment as its file gives it."""

    path: Path
    """The file."""
    settings: Settings
    """Its scalar fields."""
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Recipe fields by axis and level."""
    common: Mapping[str, Any]
    """Recipe fields of all cells."""

    def cells(self) -> list[Cell]:
        """Return the product of the axes without what `skip` names."""
        found = []
        for names in itertools.product(*self.axes.values()):
            if _named(self.settings.skip, names):
                continue
            levels = dict(zip(self.axes, names, strict=True))
            fields = {key: value for axis, level in levels.items() for key, value in self.axes[axis][level].items()}
            found.append(Cell(levels=levels, fields=fields))
        return found

    def names(self) -> list[str]:
        """Return the names of cells and of levels."""
        levels = [name for cell in self.cells() for name in cell.levels.values()]
        return list(dict.fromkeys([*(cell.name for cell in self.cells()), *levels]))

    def seeds(self, cell: Cell, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        """Return the seeds of a cell: those that were asked for, or all of the file's; of some cells only its first."""
        seeds, first = self.settings.seeds if asked is None else asked, self.settings.seeds[0]
        if _named(self.settings.once, cell.levels.values()):
            return tuple(seed for seed in seeds if seed == first)
        return seeds


def _named(groups: Iterable[Iterable[str]], levels: Iterable[str]) -> bool:
    """Return whether all levels of one of the groups are among these."""
    return any(set(group) <= set(levels) for group in groups)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says."""

    data: Path
    """Folder with `train` and `val`."""
    classes: int
    """Folders in each."""
    seeds: tuple[int, ...] | None = None
    """In place of the experiment's."""
    only: tuple[str, ...] = ()
    """Names of cells or levels; none are all cells."""
    overrides: tuple[str, ...] = ()
    """Fields of all recipes, those of the generator's after `generator.`."""
    n: int = 2000
    """Images of each generator."""
    features: str = "lite2"
    """Network to look through, as `softvq evaluate --features` takes it."""
    perceptual: str = "auto"
    """As `softvq evaluate reconstruction` takes it."""
    workers: int = 2
    """Processes that decode for each evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One process: train a model and measure it."""

    name: str
    """Its folder, relative to OUT, where its commands are carried out: the same for the same work."""
    title: str
    """What it is, for people."""
    seed: int
    """Of its training."""
    shape: str
    """Jobs of the same compute alike, so that compiled code of one serves the other."""
    recipe: str
    """The resolved recipe, as YAML; '' of a job that trains nothing."""
    commands: tuple[tuple[str, ...], ...]
    """Arguments of `softvq`, one command after the other."""
    parents: tuple[str, ...]
    """Names of the jobs whose models or latents it needs."""
    passing: bool
    """Whether it is for other jobs alone, and goes when those are finished."""
    sha256: str
    """Of all that decides its result."""


def read_experiment(path: Path) -> Experiment:
    """Read an experiment, strictly.

    Args:
        path: Its YAML.

    Returns:
        The experiment; its recipes are read by `build_jobs`.

    Raises:
        InputError: If a field is unknown, missing or wrong.
    """
    data = read_yaml(path)
    axes, common = data.pop("axes", None), data.pop("common", {})
    if not isinstance(axes, dict) or not axes or not isinstance(common, dict):
        raise InputError(f"{path}: expected axes, a group of named levels for each axis, and common, a group of fields")
    for axis, levels in axes.items():
        if (
            not isinstance(levels, dict)
            or not levels
            or not all(isinstance(fields, dict) for fields in levels.values())
        ):
            raise InputError(f"{path}: axes.{axis} is {levels!r}, expected levels with recipe fields, {{}} for none")
    experiment = Experiment(path=path, settings=from_dict(Settings, data, str(path)), axes=axes, common=common)
    known = {level for levels in axes.values() for level in levels}
    for field in ("skip", "once"):
        for group in getattr(experiment.settings, field):
            if not group or not known.issuperset(group):
                raise InputError(f"{path}: {field} has {list(group)}, expected names of levels")
    for plot in experiment.settings.plots:
        if plot.x not in {*axes, *FIGURES} or (plot.lines is not None and plot.lines not in axes):
            raise InputError(
                f"{path}: plots: x is {plot.x!r} and lines {plot.lines!r}, expected axes, or a figure as x"
            )
    names = [cell.name for cell in experiment.cells()]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"{path}: two cells have the same name, or none is left; give levels other names")
    return experiment


def build_jobs(experiment: Experiment, options: Options) -> tuple[dict[str, Job], dict[tuple[str, int], list[str]]]:
    """Return the jobs of an experiment, and the names of those that each cell and seed needs.

    Jobs that do the same have the same name, so that cells share them, also those of several experiments in one OUT.
    `start_from: cell:NAME` starts from the tokenizer of that cell with the same seed.

    Args:
        experiment: The experiment.
        options: What the command line says.

    Returns:
        Jobs by name, those that others need first; and names of jobs by cell and seed.

    Raises:
        InputError: If a recipe cannot be resolved.
    """
    builder, wanted = _Builder(experiment, options), {}
    cells = experiment.cells()
    for cell in cells:
        if options.only and not {cell.name, *cell.levels.values()} & set(options.only):
            continue
        for seed in experiment.seeds(cell, options.seeds):
            wanted[cell.name, seed] = builder.jobs_of(cell, seed)
    return builder.jobs, wanted


class _Builder:
    def __init__(self, experiment: Experiment, options: Options) -> None:
        self.experiment, self.options = experiment, options
        self.folder = experiment.path.parent
        self.cells = {cell.name: cell for cell in experiment.cells()}
        self.jobs: dict[str, Job] = {}
        self.shapes: dict[str, dict[str, int]] = {}
        self.begun: list[str] = []

    def jobs_of(self, cell: Cell, seed: int) -> list[str]:
        tokenizer = self.tokenizer(cell, seed)
        if self.experiment.settings.generator is None:
            return [tokenizer]
        return [tokenizer, self.generator(cell, seed, tokenizer)]

    def changes(self, cell: Cell, seed: int, *, generator: bool) -> list[str]:
        """Return overrides of one of the two recipes: the file's common ones, the cell's, then the command line's."""
        pairs = [*_pairs(self.experiment.common), *_pairs(cell.fields), *self.options.overrides]
        mine = [pair for pair in pairs if pair.startswith(GENERATOR) == generator]
        return [*(pair.removeprefix(GENERATOR) for pair in mine), f"seed={seed}"]

    def tokenizer(self, cell: Cell, seed: int) -> str:
        if cell.name in self.begun:
            raise InputError(f"{self.experiment.path}: {cell.name!r} starts from itself; let start_from name another")
        options, path = self.options, self.folder / self.experiment.settings.recipe
        recipe = read_recipe(path, self.changes(cell, seed, generator=False), {})
        parents = []
        if recipe.start_from is not None and recipe.start_from.startswith(CELL):
            other = self.cells.get(recipe.start_from.removeprefix(CELL))
            if other is None:
                raise InputError(
                    f"{self.experiment.path}: start_from is {recipe.start_from!r}, which is no cell's name"
                )
            self.begun.append(cell.name)
            parents = [self.tokenizer(other, seed)]
            self.begun.pop()
            recipe = dataclasses.replace(recipe, start_from=f"{parents[0]}/run/tokenizer")
        data, model = options.data.resolve(), f"{OWN}/run/tokenizer"
        train = ["train", "tokenizer", "--config", f"{OWN}/recipe.yaml", "--data", f"{data}/train"]
        commands = [[*train, "--run", f"{OWN}/run", "--device", DEVICE]]
        measured = ["--batch-size", "128", "--device", DEVICE]
        if "reconstruction" in self.experiment.settings.measure:
            looked = ["--features", options.features, "--perceptual", options.perceptual]
            looked += ["--workers", str(options.workers), "--out", f"{OWN}/reconstruction"]
            commands.append(["evaluate", "reconstruction", model, f"{data}/val", *looked, *measured])
        if "probe" in self.experiment.settings.measure:
            looked = ["--on", "latents-pooled", "--workers", str(options.workers), "--out", f"{OWN}/probe"]
            commands.append(["evaluate", "probe", model, str(data), *looked, *measured])
        shape = f"{recipe.train.batch_size} x {recipe.model.image_size} px, {recipe.model.patch_size} px a patch, "
        shape += f"{recipe.model.num_latent_tokens} tokens of a tokenizer"
        name = self.add(("tokenizer", cell, seed), shape, to_yaml(recipe), commands, parents)
        self.shapes[name] = {"num_tokens": recipe.model.num_latent_tokens, "latent_dim": recipe.model.latent_dim}
        return name

    def generator(self, cell: Cell, seed: int, tokenizer: str) -> str:
        settings, options = self.experiment.settings, self.options
        path = self.folder / str(settings.generator)
        shape = {**self.shapes[tokenizer], "num_classes": options.classes}
        written = apply_overrides(read_yaml(path), self.changes(cell, seed, generator=True))
        recipe = from_dict(GeneratorRunConfig, expand_generator(written, shape), str(path))
        data, device = options.data.resolve(), ["--device", DEVICE]
        latents = self.latents(cell, seed, tokenizer)
        train = ["train", "generator", "--config", f"{OWN}/recipe.yaml", "--latents", f"{latents}/cache"]
        sampled = ["--n", str(options.n), "--guidance", f"{settings.guidance:g}", "--seed", str(seed)]
        sampled += ["--features", options.features, "--workers", str(options.workers), "--batch-size", "250"]
        sampled += ["--keep-features", REFERENCE]
        made = ["evaluate", "generation", f"{OWN}/run/generator", f"{data}/train", "--crop", *sampled]
        commands = [
            [*train, "--run", f"{OWN}/run", *device],
            [*made, "--out", f"{OWN}/generation", *device],
        ]
        shape = f"{recipe.train.batch_size} x {recipe.model.num_tokens} tokens of {recipe.model.latent_dim} numbers"
        return self.add(("generator", cell, seed), shape, to_yaml(recipe), commands, [latents])

    def latents(self, cell: Cell, seed: int, tokenizer: str) -> str:
        """Return the job that encodes the photographs, once for all generators on a tokenizer."""
        options = self.options
        cached = ["cache-latents", f"{tokenizer}/run/tokenizer", f"{options.data.resolve()}/train", f"{OWN}/cache"]
        cached += ["--workers", str(options.workers), "--batch-size", "128", "--device", DEVICE]
        return self.add((LATENTS, cell, seed), self.jobs[tokenizer].shape, "", [cached], [tokenizer])

    def add(
        self, what: tuple[str, Cell, int], shape: str, recipe: str, commands: list[list[str]], parents: Sequence[str]
    ) -> str:
        decisive = [_without(command, "--workers") for command in commands]
        facts = [recipe, decisive, [self.jobs[parent].sha256 for parent in parents]]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        kind, cell, seed = what
        name = f"{kind.removesuffix('s')}s/{digest[:SHOWN]}"
        self.jobs.setdefault(
            name,
            Job(
                name=name,
                title=f"{self.experiment.path.stem}: {kind} of {cell.name}, seed {seed}",
                seed=seed,
                shape=shape,
                recipe=recipe,
                commands=tuple(tuple(word.replace(OWN, name) for word in command) for command in commands),
                parents=tuple(parents),
                passing=kind == LATENTS,
                sha256=digest,
            ),
        )
        return name


def _without(command: list[str], option: str) -> list[str]:
    """Return a command without an option and its value."""
    return [word for word, before in zip(command, ["", *command], strict=False) if option not in (word, before)]


def _pairs(fields: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in fields.items()]
