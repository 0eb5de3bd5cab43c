"""softvq bench: figures that follow from what was timed, and one sentence for what cannot be."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from softvq.arguments.speed import STANDARD
from softvq.cli import main
from softvq.commands import bench as command
from softvq.commands import bench_jobs
from softvq.commands.train import generator_recipe_of, read_recipe
from softvq.evaluation.profiling import Share
from softvq.evaluation.timing import Timing, count_flops
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.presets import preset
from tests.program import Program

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ("--preset", "softvq-tiny-16", "--batch", "2", "--rounds", "1", "--no-compile", "--precision", "float32")


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "matrix_peak", lambda *_: 1e10)
    monkeypatch.setattr(command, "copy_rate", lambda *_: 2e9)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def fix(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Call everything once, and let it seem to take so long."""

    rounds = ((1.0, 2.0, 9.0), (1.0, 1.0, 3.0))  # whose ratios are 1, 2, 3

    def timed(calls, *_, **__):
        for call in calls:
            call()
        return [
            Timing(seconds=s, low=0.9 * s, high=1.3 * s, rounds=rounds[i], memory=2**29)
            for i, s in enumerate(seconds[: len(calls)])
        ]

    monkeypatch.setattr(bench_jobs, "time_in_turns", timed)


@pytest.mark.parametrize("job", ["encode", "decode"])
def test_a_tokenizer_beside_timm(job: str, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    fix(monkeypatch, 0.5, 0.25)
    assert program("bench", job, *TINY, "--baseline", "timm", "--out", "x.json").code == 0
    report = json.loads(Path("x.json").read_text())
    ours, theirs = report["rows"]
    assert (ours["job"], ours["model"], ours["batch"], ours["images_per_sec"]) == (job, "softvq-tiny-16", 2, 4.0)
    config = preset("softvq-tiny-16")
    shape = (3, 256, 256) if job == "encode" else (config.num_latent_tokens, config.latent_dim)
    assert ours["flops"] == count_flops(getattr(ImageTokenizer(config), job), (2, *shape))
    assert theirs["note"] == "ours takes 2.000 of its time"
    assert (ours["precision"], ours["compiled"]) == ("float32", False)
    share = f"{ours['flops'] / 0.5 / 1e10:.0%}"
    table = program("bench", "table", "x.json").out
    assert f"| {job} | softvq-tiny-16 | 2 | 500 ± 20.0% | 4 | {share} | 0.50 |  | float32, not compiled |" in table
    assert "Matrix products and copies reached 0.01 TFLOP/s and 2 GB/s." in table


def test_a_generator_is_timed_with_the_decoding(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    fix(monkeypatch, 0.4, 2.0)
    small = ("--generator", "sit-tiny", "--tokens", "4", "--dim", "8", "--steps", "10")
    assert program("bench", "sample", *TINY, *small, "--out", "x.json").code == 0
    step, decoding = json.loads(Path("x.json").read_text())["rows"]
    assert step["seconds"] == pytest.approx(0.1)  # four steps were timed
    assert step["images_per_sec"] == pytest.approx(2 / (10 * 0.1 + 2.0))
    assert decoding["images_per_sec"] == 1.0
    assert program("bench", "sample", *TINY, *small, "--latents-only", "--out", "y.json").code == 0
    (alone,) = json.loads(Path("y.json").read_text())["rows"]
    assert alone["images_per_sec"] == pytest.approx(2 / (10 * 0.1))
    for options, expected in ((("--guidance", "1"), 2 * count_one(4)), (("--sampler", "heun"), None)):
        assert program("bench", "sample", *TINY, *small, *options, "--out", "z.json", "--overwrite").code == 0
        assert json.loads(Path("z.json").read_text())["rows"][0]["flops"] == expected
    alone = count_one(4)
    assert step["flops"] == 2 * 2 * alone  # two images, each with its condition and without


def count_one(tokens: int) -> int:
    return bench_jobs._evaluation_flops(bench_jobs.generator_preset("sit-tiny", num_tokens=tokens, latent_dim=8))


def test_operations_of_a_generator_grow_with_its_tokens() -> None:
    assert 1.5 * count_one(4) < count_one(8) < 3 * count_one(4)


def test_updates_of_recipes(program: Program) -> None:
    tiny = (str(CONFIGS / "tiny.yaml"), "train.batch_size=2", "loss.perceptual_weight=0", "train.compile=false")
    assert program("bench", "train-tokenizer", *tiny, "--device", "cpu", "--out", "t.json").code == 0
    (row,) = json.loads(Path("t.json").read_text())["rows"]
    assert (row["job"], row["model"], row["batch"], row["note"]) == ("update", "tiny", 2, "pixels")
    assert row["images_per_sec"] == pytest.approx(2 / row["seconds"])
    sit = (str(CONFIGS / "generators" / "sit-s.yaml"), "train.batch_size=2", "train.compile=false")
    small = ("--tokens", "4", "--dim", "8", "model.network.width=24", "model.network.depth=1")
    small += ("model.network.num_heads=2",)
    assert program("bench", "train-generator", *sit, *small, "--device", "cpu", "--out", "g.json").code == 0
    table = program("bench", "table", "t.json", "g.json").out
    assert "| update | sit-s, 4 tokens | 2 |" in table
    assert table.count("| update |") == 2
    assert table.count("| job |") == 1
    other = json.loads(Path("g.json").read_text()) | {"machine": "a better one"}
    Path("o.json").write_text(json.dumps(other))
    table = program("bench", "table", "t.json", "o.json", "g.json").out
    assert table.count("| job |") == 2
    assert table.index("| tiny |") < table.index("a better one") < table.rindex("| sit-s, 4 tokens |")


@pytest.mark.parametrize("line", [line for lines in STANDARD.values() for line in lines])
def test_standard_jobs_are_commands(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(command, "bench", asked.append)
    assert main(["bench", *line.split()]) == 0
    (job,) = asked
    if job.job == "train-tokenizer":
        read_recipe(CONFIGS.parent / job.config, job.overrides, {})
    elif job.job == "train-generator":
        shape = {"num_tokens": job.tokens, "latent_dim": job.dim, "num_classes": 10}
        generator_recipe_of(CONFIGS.parent / job.config, job.overrides, {}, shape)
    else:
        assert preset(job.preset)


def test_where_the_time_goes_is_told_of_a_gpu_alone(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = (str(CONFIGS / "tiny.yaml"), "train.batch_size=2", "loss.perceptual_weight=0", "train.compile=false")
    line = ("bench", "train-tokenizer", *tiny, "--device", "cpu", "--profile")
    program.refuses(*line, names=("--profile is of a GPU's kernels", "cpu"))
    updates: list[object] = []

    def look(_: object, __: object, found: list[tuple[Share, ...]]) -> Callable[[Callable[[], object]], None]:
        def taken(update: Callable[[], object]) -> None:
            updates.append(update())
            attention = Share(kind="attention", seconds=0.003, launches=8.0, longest="sdpa")
            found.append((attention, Share(kind="other", seconds=0.001, launches=2.0, longest="x")))

        return taken

    monkeypatch.setattr(bench_jobs, "_look", look)
    assert "where the time of one update goes" in " ".join(program(*line, "--out", "t.json").out.split())
    assert len(updates) == 1
    assert "loss" in updates[0]
    table = program("bench", "table", "t.json").out
    assert "tiny, pixels, batch 2: where the time of one update goes" in table
    assert "| attention | 3 | 75% | 8 |\n| other | 1 | 25% | 2 |" in table


def test_all_jobs_are_run_once(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    fix(monkeypatch, 0.5, 0.25)
    lines = (f"encode {' '.join(TINY)}", f"decode {' '.join(TINY)}", "train-tokenizer nowhere.yaml")
    monkeypatch.setitem(STANDARD, "cpu", lines)
    first = program("bench", "all", "made", "--device", "cpu")
    assert sorted(path.name for path in Path("made").iterdir()) == ["01-encode.json", "02-decode.json"]
    assert "left out: nowhere.yaml is in softvq's repository; run this there" in first.err
    assert "| encode | softvq-tiny-16 |" in first.out
    before = Path("made/02-decode.json").read_bytes()
    Path("made/01-encode.json").unlink()
    monkeypatch.setattr(command, "copy_rate", lambda *_: 3e9)
    assert program("bench", "all", "made", "--device", "cpu").code == 0
    assert Path("made/02-decode.json").read_bytes() == before
    assert json.loads(Path("made/01-encode.json").read_text())["copy_bytes"] == 3e9


def test_what_cannot_be_timed_is_one_sentence(program: Program) -> None:
    program.refuses("bench", "encode", "--preset", "softvq-x", names=("preset is 'softvq-x'", "softvq-s-64"))
    program.refuses("bench", "sample", "--generator", "sit-x", names=("no generator 'sit-x'", "sit-s"))
    program.refuses("bench", "train-tokenizer", "no.yaml", names=("no.yaml",))
    Path("there.json").write_text("{}")
    program.refuses("bench", "encode", *TINY, "--out", "there.json", names=("there.json", "--overwrite"))
    program.refuses("bench", "table", "there.json", names=("there.json", "machine"))
