"""One, two and four processes: the same losses, and what a second GPU is worth.

    python benchmarks/scaling.py [--steps 200] [--gpus 2] [--only losses|speed] [--compile]

The first table has the largest relative difference of a logged loss from that of one process, over all steps: a small
tokenizer with every loss on, its discriminator from the second step, and a small SiT, with one global batch on CPUs
through gloo; copied to each process (DDP) or spread over them (FSDP2), and gone on with, from the middle of what two
spread processes did, by one and by four.

With GPUs the second table has images per second and peak memory of one and of `--gpus`, each with the same batch: the
recipe `configs/softvq-l-64.yaml` with all its losses, and SiT-XL on 32 tokens. Weights are random, which speed does not
depend on, and images and latents are made up, so that nothing has to be fetched.
"""

import argparse
import copy
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from softvq.config import apply_overrides, from_dict, read_yaml
from softvq.data.folder import Batch
from softvq.data.latent_set import LatentBatch
from softvq.evaluation.estimate import untrained_task
from softvq.ranks import is_main, rank, world_size
from softvq.training import distributed
from softvq.training.checkpoint import Checkpoint
from softvq.training.generator_recipe import GeneratorRunConfig, expand_generator
from softvq.training.generator_run import build_generator
from softvq.training.generator_task import GeneratorTask
from softvq.training.task import Task
from softvq.training.tokenizer_recipe import TokenizerRunConfig, expand_preset
from softvq.training.tracking import read_log
from softvq.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"none": "DDP", "fsdp": "FSDP2"}
VIT = {"width": 32, "depth": 2, "num_heads": 2}
TINY = {
    "model": {
        "encoder": VIT, "decoder": VIT, "num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8,
        "quantizer": {"kind": "softvq", "codebook_size": 16},
    },
    "loss": {
        "perceptual_weight": 0.0,
        "adversarial": {
            "discriminator": {
                "kind": "dino", "backbone": "test_vit", "pretrained": False, "layers": [1, 2], "image_size": 32,
                "kernel": 3,
            },
            "start": 1,
        },
        "alignment": {"teacher": "test_vit", "pretrained": False, "hidden": 16, "mode": "avg_1d", "precision": "fp32"},
    },
    "optim": {"lr": 1e-4, "warmup_steps": 100},
}  # fmt: skip
SMALL = {
    "model": {
        "num_tokens": 4, "latent_dim": 8, "num_classes": 3, "process": {"kind": "flow"},
        "network": {"kind": "transformer", "width": 32, "depth": 2, "num_heads": 2},
    },
    "optim": {"lr": 1e-4, "warmup_steps": 100},
}  # fmt: skip
CPU = {"batch_size": 8, "precision": "fp32", "log_every": 1, "sample_every": 0, "device": "cpu", "keep": 9}
PER_GPU = {"tokenizer": 32, "generator": 256}
NAMES = {"tokenizer": "tokenizer L-64, all losses", "generator": "SiT-XL, 32 tokens"}
ALL_ON = (
    "loss.perceptual_start=0", "loss.perceptual_warmup_steps=0", "loss.adversarial.start=0",
    "model.encoder.pretrained=null", "loss.alignment.pretrained=false",
    "loss.adversarial.discriminator.pretrained=false",
)  # fmt: skip
UNTIMED, TIMED = 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gpus", type=int, default=min(2, torch.cuda.device_count()))
    parser.add_argument("--only", choices=("losses", "speed"))
    parser.add_argument("--compile", action="store_true", help="compile the networks, which takes minutes")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # in a process that torchrun started
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "speed":
            for jobs in ({"losses": 1, "losses-2": 2}, {"losses-4": 4, "losses-last": 1}):  # what goes on comes second
                launch(jobs, Path(folder), arguments)
            print_losses(Path(folder), arguments.steps)
        if arguments.only != "losses" and arguments.gpus > 0:
            for count in dict.fromkeys((1, arguments.gpus)):
                launch({f"speed-{count}": count}, Path(folder), arguments)
            print_speed(Path(folder), arguments.gpus)


def launch(jobs: Mapping[str, int], folder: Path, arguments: argparse.Namespace) -> None:
    """Start this file in so many processes for each job, at once, and go on when all have ended well."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # DDP warns of an option that its next version calls otherwise
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    started, running = time.perf_counter(), {}
    for job, count in jobs.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += [__file__, "--work", f"{folder}:{job}", "--steps", str(arguments.steps)]
        command += ["--compile"] if arguments.compile else []
        running[job] = subprocess.Popen(command, cwd=ROOT, env=environment)
    codes = {job: process.wait() for job, process in running.items()}
    if any(codes.values()):
        sys.exit(f"ended badly: {codes}")
    Console(stderr=True).print(f"{', '.join(jobs)}: {time.perf_counter() - started:.0f} s")


def work(arguments: argparse.Namespace) -> None:
    """Do one job as one of its processes."""
    folder, _, job = arguments.work.rpartition(":")
    device = torch.device("cpu") if job.startswith("losses") else distributed.choose_device("cuda")
    distributed.join(device)
    try:
        if job.startswith("losses"):
            train_small(Path(folder), arguments.steps, job)
        else:
            time_large(Path(folder) / f"{job}.json", arguments.compile)
    finally:
        distributed.leave()


def small(kind: str, steps: int, shard: str) -> tuple[Any, Task, Callable[[int], Any]]:
    """Return the recipe of a small training, its task, and this process's part of the batch of a step."""
    train = {**CPU, "steps": steps, "save_every": steps // 2, "shard": shard}
    recipe = TokenizerRunConfig if kind == "tokenizer" else GeneratorRunConfig
    config: Any = from_dict(recipe, {**(TINY if kind == "tokenizer" else SMALL), "train": train})
    task = task_of(kind, config)
    share = config.train.batch_size // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)

    def batch(step: int) -> Any:
        return made_up(kind, config, step, mine)

    return config, task, batch


def task_of(kind: str, config: Any) -> Task:
    torch.manual_seed(0)
    return untrained_task(config) if kind == "tokenizer" else GeneratorTask(build_generator(config), seed=config.seed)


def made_up(kind: str, config: Any, step: int, mine: slice) -> Any:
    """Return a part of a batch that is a function of the step alone."""
    count, random = config.train.batch_size, torch.Generator().manual_seed(step)
    labels, positions = torch.arange(count)[mine], (step * count + torch.arange(count))[mine]
    if kind == "tokenizer":
        coarse = torch.rand(count, 3, 4, 4, generator=random)[mine] * 2 - 1
        images = torch.nn.functional.interpolate(coarse, size=(config.model.image_size,) * 2, mode="bilinear")
        return Batch(images=images, labels=labels, positions=positions, skipped=[])
    latents = torch.randn(count, config.model.num_tokens, config.model.latent_dim, generator=random)[mine]
    return LatentBatch(latents=latents, labels=labels % config.model.num_classes, positions=positions)


def train_small(folder: Path, steps: int, job: str) -> None:
    """Train everything small with so many processes, and go on with what two did."""
    count = world_size()
    for kind in NAMES:
        runs = [(shard, f"{kind} {WAYS[shard]} {count}", False) for shard in WAYS if count > 1 or shard == "none"]
        resumed = ("fsdp" if count > 1 else "none", f"{kind} 2 to {count}", True)
        if job == "losses-last":
            runs = [resumed]
        elif count == 4:
            runs.append(resumed)
        for shard, name, goes_on in runs:
            config, task, batch = small(kind, steps, shard)
            (folder / name).mkdir(exist_ok=True)
            options: dict[str, Any] = {"seed": config.seed, "console": Console(quiet=True)}
            trainer = Trainer(task, folder / name, config.train, config.optim, **options)
            if goes_on:
                half = steps // 2
                trainer.restore(Checkpoint(folder=folder / f"{kind} FSDP2 2/checkpoints/step-{half:08d}", step=half))

            def stream(start: int, steps: int, batch: Callable[[int], Any] = batch) -> Iterator[Any]:
                return map(batch, range(start, start + steps))

            trainer.fit(stream)
            distributed.wait_for_all()


def print_losses(folder: Path, steps: int) -> None:
    table = Table(
        "training", "processes", "steps", "largest relative difference of the loss", title="CPU, gloo, float32"
    )
    for kind in NAMES:
        whole = {line["step"]: line for line in read_log(folder / f"{kind} DDP 1" / "log.jsonl")}
        for name in ("DDP 2", "FSDP2 2", "DDP 4", "FSDP2 4", "2 to 1", "2 to 4"):
            lines = read_log(folder / f"{kind} {name}" / "log.jsonl")
            assert lines[-1]["step"] == steps, (kind, name)
            losses = ("loss", "critic_loss")
            pairs = [(line[key], whole[line["step"]][key]) for line in lines for key in losses if key in line]
            worst = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
            table.add_row(kind, f"FSDP2 {name}, resumed" if "to" in name else name, str(len(lines)), f"{worst:.1e}")
    Console().print(table)


def large(kind: str, compiled: bool) -> Any:
    """Return the recipe of a large training."""
    batch = PER_GPU[kind] * world_size()
    train = [f"train.batch_size={batch}", f"train.compile={str(compiled).lower()}", "train.sample_every=0"]
    if kind == "tokenizer":
        data = apply_overrides(read_yaml(ROOT / "configs/softvq-l-64.yaml"), [*ALL_ON, *train])
        return from_dict(TokenizerRunConfig, expand_preset(data))
    data = apply_overrides(read_yaml(ROOT / "configs/generators/sit-xl.yaml"), train)
    shape = {"num_tokens": 32, "latent_dim": 64, "num_classes": 1000}
    return from_dict(GeneratorRunConfig, expand_generator(data, shape))


def time_large(out: Path, compiled: bool) -> None:
    """Time updates of both large trainings, copied and spread."""
    device, found = distributed.choose_device("cuda"), {}
    for kind in NAMES:
        config = large(kind, compiled)
        task = task_of(kind, config)  # building takes longer than copying
        mine = slice(rank() * PER_GPU[kind], (rank() + 1) * PER_GPU[kind])
        batch = made_up(kind, config, 0, mine)
        for shard in WAYS if world_size() > 1 else ("none",):
            train = dataclasses.replace(config.train, shard=shard)
            options: dict[str, Any] = {"seed": config.seed, "console": Console(quiet=True)}
            trainer = Trainer(copy.deepcopy(task), Path(), train, config.optim, **options)
            found[f"{kind} {shard}"] = timed(trainer, batch, device)
            del trainer
            gc.collect()
            torch.cuda.empty_cache()
        del task
    found["machine"] = torch.cuda.get_device_name(device)
    if is_main():
        out.write_text(json.dumps(found))


def timed(trainer: Trainer, batch: Any, device: torch.device) -> dict[str, float]:
    """Return the seconds of an update, and the most memory of any process."""
    trainer.task.train()
    torch.cuda.reset_peak_memory_stats(device)
    for number in range(UNTIMED + TIMED):
        if number == UNTIMED:
            trainer.check_finite()  # waits for the GPU
            distributed.wait_for_all()
            started = time.perf_counter()
        trainer.update(batch)
        trainer.step += 1
    trainer.check_finite()
    torch.cuda.synchronize(device)
    distributed.wait_for_all()
    seconds = (time.perf_counter() - started) / TIMED
    memory = distributed.max_over_ranks(torch.tensor(float(torch.cuda.max_memory_allocated(device)), device=device))
    return {"seconds": seconds, "memory": float(memory), "batch": trainer.config.batch_size}


def print_speed(folder: Path, gpus: int) -> None:
    results = {count: json.loads((folder / f"speed-{count}.json").read_text()) for count in {1, gpus}}
    title = f"{results[1]['machine']}, torch {torch.__version__}"
    table = Table("training", "GPUs", "batch", "s/update", "images/s", "times one GPU", "peak GiB of each", title=title)
    for kind, name in NAMES.items():
        rows = [("1", results[1][f"{kind} none"])]
        rows += [(f"{gpus} {WAYS[shard]}", results[gpus][f"{kind} {shard}"]) for shard in WAYS if gpus > 1]
        alone = rows[0][1]["batch"] / rows[0][1]["seconds"]
        for how, row in rows:
            pace = row["batch"] / row["seconds"]
            cells = (f"{row['batch']:.0f}", f"{row['seconds']:.4f}", f"{pace:,.1f}", f"{pace / alone:.2f}")
            table.add_row(name, how, *cells, f"{row['memory'] / 2**30:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
