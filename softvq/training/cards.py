"""What a run knows for the card of the model that it made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softvq.config import to_dict, to_yaml
from softvq.training.run_folder import FREE_FIELDS
from softvq.training.tracking import read_log

__all__ = ["card_facts"]

LEFT_OUT = FREE_FIELDS | {"latents", "held_out", "data.path", "data.num_workers", "data.cache_megabytes"}
"""Where files were and what changes no result, which is nobody else's business."""
FIGURES = {"loss": "training loss", "psnr": "PSNR of the sample grid"}


def card_facts(run: Path, config: Any, data: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run knows for a card, from its recipe, its data set and its log.

    Args:
        run: The folder.
        config: The recipe, a dataclass.
        data: The number of images and the fingerprint of the data set.

    Returns:
        As `softvq.hub.model_card` takes them.
    """
    recipe = to_yaml(_kept(to_dict(config), ""))
    steps, size = config.train.steps, config.train.batch_size
    return {
        "Data": f"{data['images']:,} images with the fingerprint `{data['fingerprint'][:12]}`; whose they are is not "
        "recorded.",
        "Recipe": f"{steps:,} steps of {size} images:\n\n```yaml\n{recipe}```\n",
        "Figures": f"{_figures(run)} `softvq evaluate` measures.",
    }


def _kept(group: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name: _kept(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in group.items()
        if prefix + name not in LEFT_OUT
    }


def _figures(run: Path) -> str:
    """Say what stands last in the log."""
    last: dict[str, str] = {}
    path = run / "log.jsonl"
    for line in read_log(path) if path.is_file() else []:
        samples = line.get("samples")
        values = {**line, **(samples if isinstance(samples, dict) else {})}
        for name, words in FIGURES.items():
            if isinstance(values.get(name), float):
                last[name] = f"{words} {values[name]:.4g} at step {line['step']:,}"
    return f"Only what the log says: {'; '.join(last.values())}." if last else "Not measured."
