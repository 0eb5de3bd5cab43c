"""Experiments: what their files ask for, which jobs that are, intervals, pictures."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import report, workers
from experiments import run as runner
from experiments.plan import Job, Options, read_experiment
from experiments.plots import Point, plot
from softvq.config import read_yaml
from softvq.errors import InputError
from softvq.evaluation.charts import COLOURS
from tests.small_experiment import CLASSES, TINY, plan, write_experiment

FOLDER = Path(__file__).parents[1] / "experiments"

PROXIES = sorted(FOLDER.glob("proxy*.yaml"))

EXPERIMENTS = sorted(set(FOLDER.glob("*.yaml")) - set(PROXIES))


def recipe_of(job: Job) -> dict[str, Any]:
    return yaml.load(job.recipe, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # there are hundreds


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_cell_of_every_experiment_is_a_valid_recipe(path: Path) -> None:
    experiment = read_experiment(path)
    jobs, wanted = plan(path)
    assert len(wanted) == sum(len(experiment.seeds(cell, None)) for cell in experiment.cells())
    assert experiment.settings.plots
    assert len({job.sha256 for job in jobs.values()}) == len(jobs)
    order = list(jobs)
    for job in jobs.values():
        assert all(order.index(parent) < order.index(job.name) for parent in job.parents)
        assert not any("{own}" in word for command in job.commands for word in command)
        if job.passing:
            continue
        recipe = recipe_of(job)
        assert recipe["data"]["path"] is None
        assert job.title.endswith(f"seed {recipe['seed']}")
    last = [names[-1] for names in wanted.values()]
    assert len(set(last)) == len(last)  # no two cells are the same


@pytest.mark.parametrize("path", PROXIES, ids=lambda path: path.stem)
def test_the_proxies_say_what_they_are(path: Path) -> None:
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Hardware:", "Expectation:", "Source:"):
        assert word in head
    train = read_yaml(path)["train"]
    assert (train["cuda_graph"], train["compile"], train["sample_every"]) == (True, True, 0)


def test_every_experiment_is_in_the_readme() -> None:
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"experiments/(\w+\.yaml)", text)) >= {path.name for path in EXPERIMENTS}


def test_cells_are_the_product_without_what_is_skipped(tmp_path: Path) -> None:
    experiment = read_experiment(write_experiment(tmp_path))
    assert [cell.name for cell in experiment.cells()] == ["plain, 1", "plain, 2", "broken, 1"]
    jobs, wanted = plan(tmp_path / "tiny.yaml")
    assert len(wanted) == 6
    # the axis of the generator's steps has one tokenizer
    assert [job.title for job in jobs.values() if job.title.endswith("seed 0")] == [
        "tiny: tokenizer of plain, 1, seed 0",
        "tiny: latents of plain, 1, seed 0",
        "tiny: generator of plain, 1, seed 0",
        "tiny: generator of plain, 2, seed 0",
        "tiny: tokenizer of broken, 1, seed 0",
        "tiny: latents of broken, 1, seed 0",
        "tiny: generator of broken, 1, seed 0",
    ]
    first, second = (jobs[wanted[cell, 0][1]] for cell in ("plain, 1", "plain, 2"))
    assert first.parents == second.parents  # the latents, which are made once
    assert first.commands[0][4:6] == ("--latents", f"{first.parents[0]}/cache")
    steps = [recipe_of(jobs[wanted[f"plain, {n}", 1][1]])["train"]["steps"] for n in (1, 2)]
    assert steps == [1, 2]
    assert wanted["plain, 1", 1][0] == wanted["plain, 2", 1][0] != wanted["plain, 1", 0][0]


def test_some_cells_have_the_first_seed_alone(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, once=[["broken"]])
    cells = [("plain, 1", 0), ("plain, 1", 1), ("plain, 2", 0), ("plain, 2", 1), ("broken, 1", 0)]
    assert list(plan(path)[1]) == cells
    assert list(plan(path, seeds=(1,))[1]) == [cell for cell in cells if cell[1] == 1]


def test_equal_jobs_of_two_experiments_are_one(tmp_path: Path) -> None:
    first = write_experiment(tmp_path)
    alike = {"axes": {"rate": {"same": {}, "other": {"optim.lr": 0.5}}}, "skip": [], "plots": []}
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({**TINY, **alike}))
    names, more = plan(first)[1], plan(other)[1]
    assert more["same", 1] == names["plain, 2", 1]  # the generator's own steps are 2
    assert not set(more["other", 1]) & {name for each in names.values() for name in each}
    both = runner._jobs([read_experiment(first), read_experiment(other)], Options(data=Path("photos"), classes=CLASSES))
    assert len(both) == 14 + 6
    seeds = [job.title[-1] for job in both.values()]
    assert seeds == sorted(seeds)  # every cell once before any again


def test_what_is_common_then_the_cell_then_the_command_line(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, common={"optim.lr": 0.5, "train.steps": 3, "generator.optim.lr": 0.25})
    options = {"seeds": (7,), "only": ("2",), "overrides": ("train.steps=5", "generator.optim.lr=0.125")}
    jobs, wanted = plan(path, **options)
    assert list(wanted) == [("plain, 2", 7)]
    tokenizer, generator = (recipe_of(jobs[name]) for name in wanted["plain, 2", 7])
    assert (tokenizer["optim"]["lr"], tokenizer["train"]["steps"], tokenizer["seed"]) == (0.5, 5, 7)
    assert (generator["optim"]["lr"], generator["train"]["steps"], generator["seed"]) == (0.125, 2, 7)
    jobs, wanted = plan(path, seeds=(7,), only=("plain, 1",))
    tokenizer, generator = (recipe_of(jobs[name]) for name in wanted["plain, 1", 7])
    assert (tokenizer["train"]["steps"], generator["train"]["steps"], generator["optim"]["lr"]) == (3, 1, 0.25)
    assert set(plan(path, workers=7)[0]) == set(plan(path)[0])  # what reads changes no result
    jobs, _ = plan(path, overrides=("generator.train.steps=9",))
    assert {recipe_of(job)["train"]["steps"] for name, job in jobs.items() if name.startswith("generators")} == {9}


def test_a_cell_starts_from_another_with_the_same_seed(tmp_path: Path) -> None:
    further = {"start_from": "cell:plain", "decoder_only": True}
    # the one that is started from comes later, and was not asked for
    changes = {"generator": None, "measure": ["reconstruction"], "skip": None, "plots": None}
    path = write_experiment(tmp_path, axes={"training": {"further": further, "plain": {}}}, **changes)
    jobs, wanted = plan(path, seeds=(3,), only=("further",))
    assert [job.title for job in jobs.values()] == [
        "tiny: tokenizer of plain, seed 3",
        "tiny: tokenizer of further, seed 3",
    ]
    assert list(wanted) == [("further", 3)]
    parent, job = jobs.values()
    assert job.parents == (parent.name,)
    assert recipe_of(job)["start_from"] == f"{parent.name}/run/tokenizer"
    assert not set(jobs) & set(plan(path, seeds=(3,), overrides=("optim.lr=0.5",))[0])
    further["start_from"] = "cell:further"
    with pytest.raises(InputError, match="'further' starts from itself"):
        plan(write_experiment(tmp_path, axes={"training": {"further": further}}, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {}}, "expected axes"),
        ({"axes": {"steps": {"1": 3}}}, "axes.steps is .* expected levels"),
        ({"skip": [["nothing"]]}, "skip has .'nothing'."),
        ({"seeds": [1, 1]}, "seeds is .1, 1., expected at least one"),
        ({"measure": ["generation", "beauty"]}, "measure.1. is 'beauty'"),
        ({"generator": None}, "generator and 'generation' in measure belong together"),
        ({"plots": [{"x": "steps", "y": "beauty"}]}, "y is 'beauty', expected one of reconstruction.psnr"),
        ({"plots": [{"x": "beauty", "y": "probe.linear"}]}, "x is 'beauty'"),
        ({"axes": {"a": {"x, y": {}, "x": {}}, "b": {"z": {}, "y, z": {}}}, "skip": [], "plots": []}, "the same name"),
        ({"once": [["nothing"]]}, "once has .'nothing'."),
        ({"axes": {"a": {"x": {"train.stepz": 1}}}, "skip": [], "plots": []}, "unknown field 'train.stepz'"),
        ({"axes": {"a": {"x": {"start_from": "cell:y"}}}, "skip": [], "plots": []}, "start_from is 'cell:y'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_experiment(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        plan(path)


def test_only_names_what_there_is(tmp_path: Path) -> None:
    experiment = read_experiment(write_experiment(tmp_path))
    options = Options(data=Path("photos"), classes=CLASSES, only=("nothing",))
    with pytest.raises(InputError, match="--only has 'nothing', expected one of plain, 1; plain, 2"):
        runner._jobs([experiment], options)


def test_means_have_student_intervals() -> None:
    levels, values = {"a": "x"}, (1.0, 2.0, 4.5)
    rows = [
        report.Row(cell="x", levels=levels, seed=seed, figures={"f": value, **({"g": 1.0} if seed else {})})
        for seed, value in enumerate(values)
    ]
    found = report.summaries(rows)["x"]
    quantile = 4.302653  # of Student's distribution with 2 degrees of freedom at 0.975, as tables have it
    assert found.halves["f"] == pytest.approx(quantile * statistics.stdev(values) / math.sqrt(3), rel=1e-6)
    assert found.means == {"f": 2.5}  # a figure that a seed lacks has no mean over seeds
    assert report.half_width([1.0]) is None


def test_plots_have_a_colour_for_each_line() -> None:
    series = {"a": [Point(x=0.01, y=1.0, half=0.5), Point(x=10.0, y=2.0)], "b": [Point(x=1.0, y=1.5, half=0.1)]}
    image = plot(series, title="t", across="x", up="y", log_x=True)
    named = plot({"": [Point(x=0.0, y=1.0)]}, title="t", across="x", up="y", names=["none", "lite0"])
    seen = [{colour for _, colour in each.getcolors(1 << 20)} for each in (image, named)]
    colours = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in COLOURS]
    assert [[colour in each for colour in colours[:3]] for each in seen] == [[True, True, False], [True, False, False]]


def test_a_worker_takes_what_it_has_compiled_among_jobs_of_one_seed(tmp_path: Path) -> None:
    axes = {"tokens": {"all": {}, "some": {"model.num_latent_tokens": 2}}}
    jobs = plan(write_experiment(tmp_path, axes=axes, skip=[], plots=[]))[0].values()
    titles = ("tokenizer of all, seed 0", "tokenizer of some, seed 0", "tokenizer of some, seed 1")
    first, second, later = (next(job for job in jobs if job.title == f"tiny: {title}") for title in titles)
    assert first.shape != second.shape == later.shape
    assert workers._chosen([first, second], set(), set()) is first
    assert workers._chosen([first, second], {second.shape}, {first.shape}) is second
    assert workers._chosen([first, later], {later.shape}, set()) is first
    assert workers._chosen([first, second], set(), {first.shape}) is second  # the other worker goes on with it
    assert workers._chosen([first, second], set(), {first.shape, second.shape}) is first
