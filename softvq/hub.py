"""Model folders, `config.json` and `model.safetensors`, local or in a repository: strict in, atomic out."""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softvq.config import read_json
from softvq.errors import InputError, RunError
from softvq.files import read_tensors, replacing, write_json, write_tensors, write_text
from softvq.pretrained import bundled
from softvq.pretrained import names as bundled_names

__all__ = ["fingerprint", "load_folder", "load_strictly", "locate", "model_card", "push", "save_folder"]

FORMAT_VERSION = 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FILES = ["config.json", "model.safetensors", "tokenizer/config.json", "tokenizer/model.safetensors"]
EXAMPLE = "SoftVQVAE/softvq-l-64"
UNSAID = {
    "Data": "not recorded.",
    "Recipe": "not recorded.",
    "Figures": "not measured.",
    "Limits": "not recorded; it can do no better than what it was trained on.",
    "Licence": "not chosen. Name it here, and as `license:` at the top.",
}
"""What a card says of a model of which nobody has said more: a gap that shows is better than one that does not."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def save_folder(
    folder: Path | str, *, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str
) -> None:
    """Write a model folder: all of it, or on failure nothing. A model card that is there already is left as it is.

    The weights carry the config they were made with, so that a folder torn between two saves is noticed when read.

    Args:
        folder: Made if need be.
        kind: What the folder holds, for example `tokenizer`.
        config: Plain data, see `softvq.config.to_dict`.
        tensors: The state dict.
        card: The model card's text.

    Raises:
        RunError: If a file cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder to save the {kind} in")
    header = {"format": f"softvq-{kind}", "version": FORMAT_VERSION, **config}
    with (
        contextlib.nullcontext() if (folder / "README.md").exists() else replacing(folder / "README.md") as readme,
        replacing(folder / "config.json") as config_json,
        replacing(folder / "model.safetensors") as weights,
    ):  # all are written before the first takes its place
        write_tensors(weights, tensors, {"config": json.dumps(header, sort_keys=True)})
        write_json(config_json, header)
        if readme:
            write_text(readme, card)


def model_card(
    kind: str, tags: Sequence[str], description: str, example: str, facts: Mapping[str, str] | None = None
) -> str:
    """Return the text of a model card.

    Args:
        kind: What the folder holds, for example `tokenizer`.
        tags: For the hub.
        description: What the model does, a paragraph.
        example: Python that loads it.
        facts: `Data`, `Recipe`, `Figures`, `Limits`, `Licence` and others, a sentence each; those of the five that are
            left out are said to be unknown. Of `Recipe`, what follows a blank line stands at the end.

    Returns:
        Markdown, with the header that the hub reads.
    """
    said = {**UNSAID, **(facts or {})}
    said["Recipe"], blank, recipe = said["Recipe"].partition("\n\n")
    lines = "\n".join(f"- **{name}**: {text}" for name, text in said.items()) + blank + recipe.rstrip()
    header = f"---\nlibrary_name: softvq\ntags: [{', '.join(['softvq', *tags])}]\n---\n"
    return f"{header}\n# softvq {kind}\n\n{description}\n\n```python\n{example}\n```\n\n{lines}\n"


def load_folder(
    name_or_folder: Path | str, *, kind: str, revision: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Read a model folder or repository.

    Args:
        name_or_folder: A folder, or `owner/name` of a repository when no such folder exists.
        kind: What it must hold; folders of other software, which do not say, are passed through.
        revision: Branch, tag or commit of the repository.

    Returns:
        The config without its header, the tensors by name, and what to call the folder in errors.

    Raises:
        InputError: If it cannot be found or read, or holds something else.
    """
    folder = locate(name_or_folder, revision=revision)
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder with config.json and model.safetensors")
    if not (folder / "config.json").is_file():
        inside = next((f"; did you mean {path.parent}" for path in sorted(folder.glob("*/config.json"))), "")
        raise InputError(f"{folder}: is no model folder, it holds no config.json{inside}")
    config = read_json(folder / "config.json")
    weights = folder / "model.safetensors"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if not weights.exists() and others:
        raise InputError(f"{folder}: holds {others[0]}, a pickle, which can run code; a model.safetensors is needed")
    tensors, metadata = read_tensors(weights)
    if "format" not in config:
        return config, tensors, str(name_or_folder)
    if config["format"] != f"softvq-{kind}":
        raise InputError(f"{folder}/config.json: format is {config['format']!r}, expected 'softvq-{kind}'")
    if config.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{folder}/config.json: version is {config.get('version')!r}, this softvq reads {FORMAT_VERSION}"
        )
    if metadata.get("config") not in (None, json.dumps(config, sort_keys=True)):
        raise InputError(
            f"{folder}: config.json is not the one model.safetensors was saved with; save or fetch both again"
        )
    body = {key: value for key, value in config.items() if key not in ("format", "version")}
    return body, tensors, str(name_or_folder)


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over a config and every tensor, whatever device and dtype they have."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def locate(name_or_folder: Path | str, *, revision: str | None = None) -> Path:
    """Return where a model's files lie, fetched from the hub if need be.

    Args:
        name_or_folder: A folder; when no such folder exists, the name of a bundled model, such as `photos-64`, or
            `owner/name` of a repository.
        revision: Branch, tag or commit of the repository.

    Returns:
        A path that exists.

    Raises:
        InputError: If it cannot be found.
    """
    folder = Path(name_or_folder)
    if folder.exists():
        return folder
    return bundled(str(name_or_folder)) or _download(str(name_or_folder), revision)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give a model, usually on the meta device, the tensors of a folder: every name, every shape, every value finite.

    Args:
        model: Gets the tensors themselves, not copies.
        tensors: By the names of the model's state dict.
        where: What to call the folder in errors.

    Raises:
        InputError: Naming the first tensors that are missing, unexpected, mis-shaped or not finite.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shared = own.keys() & tensors.keys()
    misshaped = [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(shared)
        if tensors[name].shape != own[name].shape
    ]
    foreign = [f"{name} is {tensors[name].dtype}" for name in sorted(shared) if tensors[name].dtype not in FLOATS]
    ready = {} if foreign else {name: tensors[name].to(own[name].dtype) for name in shared}
    broken = [name for name, tensor in sorted(ready.items()) if not bool(torch.isfinite(tensor).all())]
    problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped, "not floats": foreign}
    problems["not finite"] = broken
    found = [f"{len(names)} tensors {what} ({_some(names)})" for what, names in problems.items() if names]
    if found:
        raise InputError(f"{where}: the weights do not fit the config: {'; '.join(found)}")
    model.load_state_dict(ready, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_()


def push(save: Callable[[Path], None], repo_id: str, *, private: bool, token: str | None) -> str:
    """Save a model into a temporary folder and upload it; return the repository's address.

    Args:
        save: Writes the model into the folder it is given.
        repo_id: `owner/name`; made if there is no such repository.
        private: Whether a new repository is private.
        token: Of the hub; None takes the one that is logged in.

    Returns:
        The repository's address.

    Raises:
        InputError: If `repo_id` is not `owner/name`.
        RunError: If the upload fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not REPOSITORY.fullmatch(repo_id):
        raise InputError(f"repo_id is {repo_id!r}, expected owner/name")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with softvq")
        except (HfHubHTTPError, OSError) as error:
            raise RunError(f"{repo_id}: the upload failed ({_first_line(error)}); nothing local was changed") from error
    return str(address)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if not REPOSITORY.fullmatch(name) or ".." in name:
        known = ", ".join(bundled_names())
        ours = f"none of {known}, which come with softvq, " if known else ""
        raise InputError(
            f"{name}: no such folder, {ours}and not the name of a repository, which is owner/name, such as {EXAMPLE}"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except RepositoryNotFoundError as error:
        raise InputError(f"{name}: no such folder here and no such repository on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = _first_line(error)
        raise InputError(f"{name}: no such folder here, and not to be had from the hub ({reason})") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
