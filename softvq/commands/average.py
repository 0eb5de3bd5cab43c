"""Averages of the weights put together after training: `softvq average`."""

import argparse
import shutil
from pathlib import Path

from torch import Tensor

from softvq import hub
from softvq.commands.common import check_output, messages, results
from softvq.errors import InputError, RunError
from softvq.training.averages import (
    check_length,
    find_snapshots,
    post_hoc_average,
    post_hoc_shares,
    snapshot_profiles,
)
from softvq.training.checkpoint import latest, load

__all__ = ["average"]

KINDS = ("generator", "tokenizer")
SAVED_ANEW = {"config.json", "model.safetensors"}
FAR = 0.05


def average(arguments: argparse.Namespace) -> None:
    """Save the model of a finished run with another average of its weights."""
    run, out = Path(arguments.run_dir), Path(arguments.out)
    if arguments.length is not None:
        check_length(arguments.length, "--length")
    kind = _kind_of(run)
    if out.resolve() == run.resolve() or out.resolve().is_relative_to((run / kind).resolve()):
        raise InputError(f"{out}: is the run's own folder, which is left as it is; give another --out")
    check_output(out, arguments.overwrite)
    if arguments.length is None:
        step, averages = _kept(run, arguments.decay)
        _save(run, kind, out, averages, str(arguments.decay))
        results().print(f"{out}: the average of decay {arguments.decay} at step {step}", soft_wrap=True)
    else:
        _put_together(run, kind, out, arguments.length)
    if kind == "tokenizer":
        messages().print(
            "its latent statistics are those of the run's model; fit them with softvq fit-stats", soft_wrap=True
        )


def _kept(run: Path, decay: float) -> tuple[int, dict[str, Tensor]]:
    """Return the average of a decay out of the newest checkpoint."""
    saved = latest(run)
    if saved is None:
        raise InputError(f"{run}: has no checkpoint, which its averages would be in; give the folder of a whole run")
    prefix, (tensors, _) = f"averages.ema_{float(decay)}.", load(saved)
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not found:
        raise InputError(f"{run}: keeps no average of decay {decay}; train with more_ema_decays, e.g. [{decay}]")
    return saved.step, found


def _put_together(run: Path, kind: str, out: Path, length: float) -> None:
    """Save the average of a relative length."""
    snapshots = find_snapshots(run)
    if not snapshots:
        raise InputError(f"{run}: keeps no averages to choose from; train with ema_lengths, e.g. [0.05, 0.1]")
    profiles = snapshot_profiles(snapshots)
    newest = max(step for step, _ in profiles)
    _, distance = post_hoc_shares(profiles, newest, length)
    _save(run, kind, out, post_hoc_average(snapshots, length), f"power_{length:g}")
    lengths = ", ".join(map(str, dict.fromkeys(length for _, length in profiles)))
    results().print(
        f"{out}: the average of length {length} at step {newest}, from {len(snapshots)} snapshots of "
        f"length {lengths}; its profile is {distance:.2%} off",
        soft_wrap=True,
    )
    if distance > FAR:
        messages().print("that is far, choose a length nearer to the kept ones, or save more often", soft_wrap=True)


def _save(run: Path, kind: str, out: Path, averages: dict[str, Tensor], name: str) -> None:
    """Write the run's model with other weights, and the name of their average."""
    config, tensors, _ = hub.load_folder(run / kind, kind=kind)
    replaced = _with_averages(tensors, averages, kind, run)
    if isinstance(config.get("sampling"), dict):
        config["sampling"]["ema"] = name
    _copy_others(run / kind, out)
    card = run / kind / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# softvq {kind}\n"
    hub.save_folder(out, kind=kind, config=config, tensors=replaced, card=text)


def _kind_of(run: Path) -> str:
    """Return what a run made, by the folder that it leaves at its end."""
    if not run.is_dir():
        raise InputError(f"{run}: no such folder, expected one that softvq train wrote")
    found = [kind for kind in KINDS if (run / kind / "config.json").is_file()]
    if not found:
        raise InputError(f"{run}: holds no {' or '.join(f'{kind}/' for kind in KINDS)}; give the folder of a whole run")
    return found[0]


def _with_averages(tensors: dict[str, Tensor], averages: dict[str, Tensor], kind: str, run: Path) -> dict[str, Tensor]:
    """Replace what was trained; buffers and frozen parameters stay, and what only helped training is left out."""
    inner = {name.removeprefix(f"{kind}."): value for name, value in averages.items() if name.startswith(f"{kind}.")}
    trained = inner or averages  # the model may be all that is trained, and is then not named
    wrong = [name for name, value in trained.items() if name not in tensors or tensors[name].shape != value.shape]
    if wrong:
        raise InputError(f"{run}: its averages are not of the model in {run / kind} ({wrong[0]}); restore what belongs")
    return {name: trained[name].to(tensor.dtype) if name in trained else tensor for name, tensor in tensors.items()}


def _copy_others(source: Path, out: Path) -> None:
    """Copy what a model folder holds besides config and weights, which come last and make it a model folder."""

    def kept_back(folder: str, names: list[str]) -> set[str]:
        return SAVED_ANEW & {*names} if Path(folder) == source else set()

    try:
        shutil.copytree(source, out, ignore=kept_back, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise RunError(f"{out}: cannot be written ({error}); make room and run this again") from error
