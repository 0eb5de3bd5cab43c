"""A tiny experiment, and a stand-in for what carries out its jobs."""

import json
from pathlib import Path
from typing import Any

from experiments.plan import Job, Options, build_jobs, read_experiment
from tests.program import write_recipe

CLASSES = 2

BROKEN = 0.125

STUB = f"""
import json, os, pathlib, signal, sys
for line in sys.stdin:
    folder, code = pathlib.Path(line.strip()), 0
    log = (folder / "log.txt").open("w")
    print("it began", os.getpid(), file=log)
    recipe = (folder / "recipe.yaml").read_text() if (folder / "recipe.yaml").exists() else ""
    if "lr: {BROKEN}" in recipe:
        code = 2
        print("softvq: it is broken", file=log, flush=True)
        if "seed: 0" in recipe:
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        models = ["run/model.safetensors", "cache/shard.safetensors", "run/checkpoints/1/state.json"]
        reports = ["reconstruction/report.html", "reconstruction/worst.png", "reconstruction/images.csv"]
        for name in [*models, *reports, "run/log.jsonl"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
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
