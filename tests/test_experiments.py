"""Experiments: what their files ask for, intervals, pictures, and a tiny one from end to end."""

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file

from experiments import report, workers
from experiments import run as runner
from experiments.plan import FIGURES, Job, Options, build_jobs, read_experiment
from experiments.plots import Point, plot
from softvq.config import read_yaml
from softvq.errors import InputError
from softvq.evaluation.charts import COLOURS
from tests.program import photograph, write_recipe

FOLDER = Path(__file__).parents[1] / "experiments"
PROXIES = sorted(FOLDER.glob("proxy*.yaml"))
EXPERIMENTS = sorted(set(FOLDER.glob("*.yaml")) - set(PROXIES))
CLASSES = 2
BROKEN = 0.125
STUB = f"""
import json, os, pathlib, sys
for line in sys.stdin:
    folder, code = pathlib.Path(line.strip()), 0
    log = (folder / "log.txt").open("w")
    print("it began", os.getpid(), file=log)
    if "lr: {BROKEN}" in (folder / "recipe.yaml").read_text():
        code = 2
        print("softvq: it is broken", file=log, flush=True)
        if "seed: 0" in (folder / "recipe.yaml").read_text():
            os._exit(9)
    else:
        job = json.loads((folder / "job.json").read_text())
        figures = {{"reconstruction.psnr": 20.0, "generation.frechet_distance": 3.0}}
        result = {{"sha256": job["sha256"], "figures": figures, "network": None}}
        (folder / "result.json").write_text(json.dumps(result))
    log.close()
    print(json.dumps({{"code": code}}), flush=True)
"""
TINY = {
    "title": "Tiny",
    "question": "Does it run?",
    "expected": "It does.",
    "recipe": "recipe.yaml",
    "generator": "generator.yaml",
    "measure": ["reconstruction", "probe", "generation"],
    "seeds": [0, 1],
    "axes": {
        "tokenizer": {"plain": {}, "broken": {"optim.lr": BROKEN}},
        "steps": {"1": {"generator.train.steps": 1}, "2": {"generator.train.steps": 2}},
    },
    "skip": [["broken", "2"]],
    "plots": [
        {"x": "steps", "y": "generation.frechet_distance", "lines": "tokenizer", "log_x": True},
        {"x": "tokenizer", "y": "reconstruction.psnr"},
        {"x": "reconstruction.psnr", "y": "probe.linear"},
    ],
}


def write_experiment(folder: Path, **changes: Any) -> Path:
    """Write a tiny experiment with its recipes."""
    write_recipe(folder / "recipe.yaml")
    generator = {
        "model": {"network": {"kind": "transformer", "width": 16, "depth": 1, "num_heads": 2}},
        "train": {"batch_size": 4, "steps": 2, "log_every": 1, "sample_every": 0},
        "sampling": {"steps": 2},
    }
    (folder / "generator.yaml").write_text(json.dumps(generator))
    path = folder / "tiny.yaml"
    path.write_text(json.dumps({key: value for key, value in {**TINY, **changes}.items() if value is not None}))
    return path


def plan(path: Path, **options: Any) -> tuple[dict[str, Job], dict[tuple[str, int], list[str]]]:
    """Return the jobs of an experiment, of photographs that need not be there."""
    return build_jobs(read_experiment(path), Options(**{"data": Path("photos"), "classes": CLASSES, **options}))


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
        recipe = recipe_of(job)
        assert recipe["data"]["path"] is None
        assert job.title.endswith(f"seed {recipe['seed']}")
        assert not any("{own}" in word for command in job.commands for word in command)
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
        "tiny: generator of plain, 1, seed 0",
        "tiny: generator of plain, 2, seed 0",
        "tiny: tokenizer of broken, 1, seed 0",
        "tiny: generator of broken, 1, seed 0",
    ]
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
    assert len(both) == 10 + 4
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
    tokenizer, generator = (recipe_of(job) for job in plan(path, seeds=(7,), only=("plain, 1",))[0].values())
    assert (tokenizer["train"]["steps"], generator["train"]["steps"], generator["optim"]["lr"]) == (3, 1, 0.25)
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


def make_classes(folder: Path) -> None:
    """Write photographs of two classes, enough for the probe's neighbours."""
    for part, count in (("train", 11), ("val", 3)):
        for number, name in enumerate("ab"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                photograph(32, 32, seed=i + 20 * number).save(folder / part / name / f"{i}.png")


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return what runs the tiny experiment, with one thread for each job."""
    write_experiment(tmp_path)
    make_classes(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    given = ["tiny.yaml", "--data", "data", "--out", "out", "--n", "6", "--features", "timm:test_vit=vit.safetensors"]
    given += ["--perceptual", "none", "--workers", "0", "--threads", "1", "--jobs", "2"]
    return lambda *more: runner.main([*given, *more])


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs pretend, so that their order and their failures are seen at once."""
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    monkeypatch.setattr(workers, "WORK", path)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)


@pytest.mark.usefixtures("stub")
def test_a_failed_job_is_told_and_does_not_stop_the_others(
    experiment: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment() == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Tiny: 10 jobs, 0 of them finished"
    broken = [line for line in said if line.startswith("tiny: tokenizer of broken")]
    assert ["failed (softvq: it is broken)" in line for line in broken] == [True] * 2
    why = "needs tiny: tokenizer of broken, 1, seed 1, which failed"
    assert f"tiny: generator of broken, 1, seed 1: {why}" in said
    out = tmp_path / "out"
    results = json.loads((out / "tiny" / "results.json").read_text())
    assert [(row["cell"], row["seed"]) for row in results["rows"]] == [
        ("plain, 1", 0), ("plain, 1", 1), ("plain, 2", 0), ("plain, 2", 1),
    ]  # fmt: skip
    assert results["failed"]["tiny: generator of broken, 1, seed 1"] == why
    assert len(results["failed"]) == 4
    assert "Failed: tiny: tokenizer of broken, 1, seed 0: failed (softvq" in (out / "tiny" / "table.md").read_text()
    assert all((out / name / "result.json").exists() for row in results["rows"] for name in row["jobs"])
    (out / "tiny" / "table.md").unlink()
    assert experiment("--report") == 0  # what failed is not tried again
    assert "| plain | 2 | 2 |" in (out / "tiny" / "table.md").read_text()


@pytest.mark.usefixtures("stub")
def test_a_worker_goes_on_with_other_jobs_until_one_ends_it(experiment: Callable[..., int], tmp_path: Path) -> None:
    assert experiment("--jobs", "1") == 1
    out = tmp_path / "out"
    logs = sorted(out.rglob("log.txt"), key=lambda path: path.stat().st_mtime_ns)
    numbers = [int(log.read_text().split()[2]) for log in logs]
    assert len(numbers) == 8  # two more need the broken ones
    assert len(set(numbers)) == 2
    changes = [place for place in range(1, 8) if numbers[place] != numbers[place - 1]]
    assert len(changes) == 1
    ended = logs[changes[0] - 1].read_text()
    assert "it is broken" in ended
    assert "seed: 0" in (logs[changes[0] - 1].parent / "recipe.yaml").read_text()


def test_a_worker_takes_what_it_has_compiled_among_jobs_of_one_seed(tmp_path: Path) -> None:
    axes = {"tokens": {"all": {}, "some": {"model.num_latent_tokens": 2}}}
    jobs = plan(write_experiment(tmp_path, axes=axes, skip=[], plots=[]))[0].values()
    titles = ("tokenizer of all, seed 0", "tokenizer of some, seed 0", "tokenizer of some, seed 1")
    first, second, later = (next(job for job in jobs if job.title == f"tiny: {title}") for title in titles)
    assert first.shape != second.shape == later.shape
    assert workers._chosen([first, second], set()) is first
    assert workers._chosen([first, second], {second.shape}) is second
    assert workers._chosen([first, later], {later.shape}) is first


@pytest.mark.usefixtures("stub")
def test_what_is_finished_is_not_done_again(
    experiment: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert experiment("--only", "plain") == 0
    dates = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(dates) == 6
    rows = json.loads((out / "tiny" / "results.json").read_text())["rows"]
    lost = out / rows[-1]["jobs"][-1] / "result.json"
    assert (rows[-1]["cell"], rows[-1]["seed"]) == ("plain, 2", 1)
    lost.unlink()
    capsys.readouterr()
    assert experiment("--only", "plain, 2") == 0
    assert "4 jobs, 3 of them finished" in capsys.readouterr().err
    assert {path for path in dates if path.stat().st_mtime_ns != dates[path]} == {lost}
    # cells that were not asked for now are in the table all the same
    assert len(json.loads((out / "tiny" / "results.json").read_text())["rows"]) == 4
    assert experiment("optim.lr=0.5", "--only", "plain, 1", "--dry-run") == 0  # another recipe is another result
    said = capsys.readouterr().err
    assert "4 jobs, 0 of them finished" in said
    assert "warning: optim.lr is given for all cells" in said


@pytest.mark.slow
def test_an_experiment_from_end_to_end(experiment: Callable[..., int], tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "vit.safetensors")
    assert experiment("--jobs", "1", "--only", "plain, 1") == 0  # the tests above have more cells
    out = tmp_path / "out"
    results = json.loads((out / "tiny" / "results.json").read_text())
    assert [(row["cell"], row["seed"]) for row in results["rows"]] == [("plain, 1", 0), ("plain, 1", 1)]
    assert results["command"].startswith("python experiments/run.py tiny.yaml --data data")
    assert {"machine", "torch", "softvq", "network", "question", "expected"} <= set(results)
    figures = results["rows"][0]["figures"]
    assert set(FIGURES) - set(figures) == {"reconstruction.st_lpips"}
    judged = json.loads((out / results["rows"][0]["jobs"][-1] / "generation" / "generation.json").read_text())
    assert figures["generation.frechet_distance"] == judged["rows"][0]["figures"]["frechet_distance"]
    assert judged["provenance"]["recipe"]["n"] == 6
    table = (out / "tiny" / "table.md").read_text()
    assert "| tokenizer | steps | seeds | PSNR in dB |" in table
    assert table.count(" ± ") > 10
    pictures = sorted((out / "tiny").glob("*.png"))
    assert [path.name for path in pictures] == [
        "1-generation-frechet-distance.png", "2-reconstruction-psnr.png", "3-probe-linear.png",
    ]  # fmt: skip
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (960, 480)
    assert not list(out.rglob("checkpoints"))
    again = out / results["rows"][1]["jobs"][-1] / "result.json"
    before = json.loads(again.read_text())["figures"]
    again.unlink()
    assert experiment("--only", "plain, 1") == 0  # in a worker that has done nothing before
    after = json.loads(again.read_text())["figures"]
    clocks = {"generator.seconds", "generator.images_per_sec"}
    assert {key: value for key, value in after.items() if key not in clocks} == {
        key: value for key, value in before.items() if key not in clocks
    }


def test_wrong_arguments_are_told_in_a_sentence(
    experiment: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment("--only", "nothing") == 2
    assert experiment("--jobs", "0") == 2
    (tmp_path / "data" / "val" / "b").rename(tmp_path / "data" / "val" / "c")
    assert experiment() == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines[:1]] == ["run.py: --only has 'nothing'"]
    assert lines[1] == "run.py: --jobs is 0 and --threads 1, expected at least 1 each"
    assert lines[2].startswith("run.py: data: train and val have different classes or none")
    assert not (tmp_path / "out").exists()


def test_a_job_sees_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.placed("cuda:1") == ("cuda", {"CUDA_VISIBLE_DEVICES": "1"})
    assert workers.placed("cpu") == ("cpu", {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert workers.placed("cuda:1") == ("cuda", {"CUDA_VISIBLE_DEVICES": "6"})
    with pytest.raises(InputError, match="'cuda:2', expected cpu or a GPU there is"):
        workers.placed("cuda:2")
