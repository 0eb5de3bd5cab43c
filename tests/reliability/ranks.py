"""Runs of several processes."""

import os
from pathlib import Path
from typing import Any

from tests.ranks import free_ports
from tests.reliability import harness
from tests.reliability.harness import code_of, fork, outcome

Figures = dict[str, Any]


def elastic(folder: Path, restarts: int = 3) -> Figures:
    """Two ranks, of which one is killed: the other ends with a sentence, both start again, and nothing is different.

    They are started and restarted as by `torchrun --max-restarts 3`, whose agent cannot fork a process safely.
    """
    codes = [_as_torchrun(folder, name, victim, restarts) for name, victim in (("two", False), ("killed-two", True))]
    identical = outcome(folder / "two") == outcome(folder / "killed-two")
    one = {line["step"]: line["loss"] for line in harness.lines_of(folder / "reference") if "loss" in line}
    two = {line["step"]: line["loss"] for line in harness.lines_of(folder / "two") if "loss" in line}
    apart = max(abs(two[step] / one[step] - 1) for step in one) if two.keys() == one.keys() else float("inf")
    return {"codes": codes, "identical": identical, "apart_from_one_process": apart}


def _as_torchrun(folder: Path, name: str, victim: bool, restarts: int) -> list[list[int]]:
    """Return the exit codes of both ranks in each attempt."""
    codes: list[list[int]] = []
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_MAX_RESTARTS": str(restarts)}
    while len(codes) <= restarts and (not codes or any(codes[-1])):
        os.environ.update(common, MASTER_PORT=str(free_ports(1)[0]))
        pids = []
        for rank in range(2):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            pids.append(fork(lambda: _rank(str(folder), name, victim)))
        codes.append([code_of(pid) for pid in pids])
    for key in (*common, "MASTER_PORT", "RANK", "LOCAL_RANK"):
        del os.environ[key]
    return codes


def _rank(folder: str, name: str, victim: bool) -> None:
    from softvq.training import tokenizer_run

    original, mark = tokenizer_run.batches, Path(folder) / "victim"

    def deadly(*args: Any) -> Any:
        for place, batch in enumerate(original(*args)):
            if victim and place == 8 and os.environ["RANK"] == "1" and not mark.exists():
                mark.write_text("")
                harness.kill_self()
            yield batch

    tokenizer_run.batches = deadly
    tokenizer_run.train_tokenizer(harness.run_config(Path(folder)), Path(folder) / name, resume=True)
