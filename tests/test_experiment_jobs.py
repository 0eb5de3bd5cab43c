"""Experiments that are carried out: workers, what fails or is cut off, latents that are shared, a tiny one for real."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from experiments import run as runner
from experiments import work, workers
from experiments.plan import FIGURES, Job
from softvq.errors import InputError
from tests.program import photograph
from tests.small_experiment import STUB, plan, write_experiment


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
    assert said[0] == "Tiny: 14 jobs, 0 of them finished"
    broken = "tiny: tokenizer of broken, 1, seed"
    killed = "its process was ended by SIGKILL, often for want of memory; last it said: softvq: it is broken"
    assert [line.rpartition(",")[0] for line in said if line.startswith(f"{broken} 0")] == [
        f"{broken} 0: failed ({killed})"
    ]
    assert [line.rpartition(",")[0] for line in said if line.startswith(f"{broken} 1")] == [
        f"{broken} 1: failed (softvq: it is broken)"
    ]
    assert f"tiny: latents of broken, 1, seed 1: needs {broken} 1, which failed" in said
    why = "needs tiny: latents of broken, 1, seed 1, which failed"
    assert f"tiny: generator of broken, 1, seed 1: {why}" in said
    out = tmp_path / "out"
    results = json.loads((out / "tiny" / "results.json").read_text())
    assert [(row["cell"], row["seed"]) for row in results["rows"]] == [
        ("plain, 1", 0), ("plain, 1", 1), ("plain, 2", 0), ("plain, 2", 1),
    ]  # fmt: skip
    assert results["failed"]["tiny: generator of broken, 1, seed 1"] == why
    assert len(results["failed"]) == 6
    assert "Failed: tiny: tokenizer of broken, 1, seed 1: failed (softvq" in (out / "tiny" / "table.md").read_text()
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
    assert len(numbers) == 8  # latents are removed with their logs, and the rest needs the broken ones
    assert len(set(numbers)) == 2
    changes = [place for place in range(1, 8) if numbers[place] != numbers[place - 1]]
    assert len(changes) == 1
    ended = logs[changes[0] - 1].read_text()
    assert "it is broken" in ended
    assert "seed: 0" in (logs[changes[0] - 1].parent / "recipe.yaml").read_text()


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
    assert "5 jobs, 3 of them finished" in capsys.readouterr().err  # latents are made anew
    assert not list(out.glob("latents/*"))
    assert {path for path in dates if path.stat().st_mtime_ns != dates[path]} == {lost}
    # cells that were not asked for now are in the table all the same
    assert len(json.loads((out / "tiny" / "results.json").read_text())["rows"]) == 4
    assert experiment("optim.lr=0.5", "--only", "plain, 1", "--dry-run") == 0  # another recipe is another result
    said = capsys.readouterr().err
    assert "6 jobs, 0 of them finished" in said
    assert "warning: optim.lr is given for all cells" in said


@pytest.mark.usefixtures("stub")
def test_latents_are_there_as_long_as_a_generator_needs_them(
    experiment: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")

    seen: list[tuple[str, int]] = []
    start = workers.Worker.start

    def watched(worker: workers.Worker, job: Job) -> None:
        caches = [path.parents[1].name for path in (tmp_path / "out").glob("latents/*/cache/shard.safetensors")]
        if job.title.startswith("tiny: generator"):
            assert job.parents == (f"latents/{caches[0]}",)
        seen.append((job.title.partition(" of ")[0], len(caches)))
        start(worker, job)

    monkeypatch.setattr(workers.Worker, "start", watched)
    left = tmp_path / "out" / "latents" / "of-a-run-that-was-cut-off"
    leave(left)
    assert experiment("--only", "plain", "--jobs", "1") == 0
    generators = [("tiny: generator", 1)] * 2
    assert seen == [("tiny: tokenizer", 0), ("tiny: latents", 0), *generators] * 2  # none of one seed beside the next's
    assert not list((tmp_path / "out" / "latents").iterdir())
    seen.clear()
    leave(left)
    assert experiment("--only", "plain") == 0
    assert (seen, left.exists()) == ([], False)


@pytest.mark.usefixtures("stub")
def test_what_is_carried_home_is_small_and_enough_for_a_report(
    experiment: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment("--only", "plain") == 0
    out = tmp_path / "out"
    (out / "generators" / "1-x.png").write_text("the plot of an experiment that is called generators")
    readme = Path(workers.__file__).with_name("README.md").read_text()
    command = next(line for line in readme.splitlines() if line.startswith("tar "))
    subprocess.run(shlex.split(command.removesuffix("OUT") + "out"), check=True)
    with tarfile.open("results.tgz") as bundle:
        names = {name.partition("/")[2] for name in bundle.getnames()}
        bundle.extractall(tmp_path / "home", filter="data")
    jobs = {str(path.parent.relative_to(out)) for path in out.rglob("job.json")}
    kept = ("job.json", "log.txt", "recipe.yaml", "result.json", "run/log.jsonl")
    assert len(jobs) == 6
    assert {name for name in names if "." in Path(name).name} == {
        *(f"{job}/{name}" for job in jobs for name in kept),
        *(f"tiny/{path.name}" for path in (out / "tiny").iterdir()),
        "generators/1-x.png",
    }
    capsys.readouterr()
    assert experiment("--report", "--out", "home/out") == 0
    lines = capsys.readouterr().out.splitlines()
    figures = "reconstruction.psnr 20, generation.frechet_distance 3"
    rows = [f"plain, {cell}, seed {seed}: {figures}" for cell in (1, 2) for seed in (0, 1)]
    assert [line for line in lines if ", seed " in line] == rows


def test_a_stopped_worker_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stub.py"
    path.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(sys.stdin.readline().strip(), 'child').write_text(f'{child.pid}\\n')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(workers, "WORK", path)
    job = next(iter(plan(write_experiment(tmp_path))[0].values()))
    worker = workers.Worker("cpu", tmp_path, 1)
    worker.start(job)
    told = tmp_path / job.name / "child"
    while not (told.exists() and told.read_text().endswith("\n")):
        assert worker.ended() is None
        time.sleep(0.01)
    child = Path("/proc", told.read_text().strip(), "stat")
    assert child.exists()
    worker.stop()
    for _ in range(200):  # init may take a moment to bury it
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("the worker's child is still there")


def test_jobs_cannot_end_a_worker_nor_be_taken_for_its_answer(tmp_path: Path) -> None:
    commands = {"good": ["--version"], "bad": ["evaluate", "probe", "nowhere", "photos", "--device", "cpu"]}
    for name, command in commands.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(json.dumps({"commands": [command], "sha256": name}))
    (tmp_path / "none").mkdir()
    # what a library prints past Python, and what reads where the names of jobs come from
    loud = "import os; os.write(1, b'noise'); print(os.path.samestat(os.fstat(0), os.stat(os.devnull)), flush=True)"
    script = (
        "import os; from experiments import work; main, done = work.softvq, work.carried_out\n"
        "work.carried_out = lambda *given: (done(*given), os.write(1, b'late'))[0]\n"
        f"work.softvq = lambda arguments: (exec({loud!r}), main(arguments))[1]\n"
        "work.main('cpu')\n"
    )
    given = "none\ngood\nbad\ngood\n"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, input=given, capture_output=True, text=True)
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [{"code": code} for code in (1, 0, 2, 0)], ran
    logs = {name: (tmp_path / name / "log.txt").read_text() for name in ("none", "good", "bad")}
    assert "FileNotFoundError" in logs["none"].splitlines()[-1]
    assert logs["good"].count("noiseTrue\nsoftvq ") == 2
    assert "nowhere" in logs["bad"].splitlines()[-1]
    assert (tmp_path / "good" / "result.json").exists()
    assert not (tmp_path / "bad" / "result.json").exists()


def test_nothing_of_a_job_is_left_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.json").write_text('{"commands": [["x"]], "sha256": ""}')
    monkeypatch.chdir(tmp_path)

    def state() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        flags = cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
        return *flags, torch.is_grad_enabled(), signal.getsignal(signal.SIGTERM), dict(os.environ), Path.cwd()

    def leaky(_: list[str]) -> int:
        drawn.append(torch.rand(1).item())
        torch.backends.cudnn.benchmark = True
        torch.use_deterministic_algorithms(True)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.environ["SOFTVQ_LEAK"] = "1"
        os.chdir("/")
        sys.exit("enough")

    before, drawn = state(), list[float]()
    monkeypatch.setattr(work, "softvq", leaky)
    assert [work.carried_out(tmp_path, "cpu") for _ in range(2)] == [1, 1]
    assert state() == before
    assert drawn[0] == drawn[1]
    assert capsys.readouterr().err.splitlines() == ["it ended with 'enough'"] * 2


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
    assert len(list((out / "reference").iterdir())) == 1  # both generators are compared with the same
    before = results["rows"][1]["figures"]  # of a worker that had carried out all jobs of another seed
    for name in results["rows"][1]["jobs"]:
        (out / name / "result.json").unlink()
    assert experiment("--jobs", "1", "--only", "plain, 1") == 0  # in one that has done nothing before
    after = json.loads((out / "tiny" / "results.json").read_text())["rows"][1]["figures"]
    clocks = {f"{source}.{clock}" for source in ("training", "generator") for clock in ("seconds", "images_per_sec")}
    assert {key: value for key, value in after.items() if key not in clocks} == {
        key: value for key, value in before.items() if key not in clocks
    }
    assert after["generator.seconds"] != before["generator.seconds"]


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
