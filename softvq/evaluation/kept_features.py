"""What networks saw in a set of images, kept in files so that nobody has to look again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from softvq import __version__
from softvq.errors import InputError
from softvq.evaluation.extractors import Extractor
from softvq.evaluation.image_sets import ImageSet
from softvq.evaluation.set_features import SetFeatures
from softvq.files import read_tensors, write_tensors

__all__ = ["kept_features"]

TENSORS = ("mean", "covariance", "spatial_mean", "spatial_covariance", "features", "logits", "order")
PLAIN = ("count", "size", "pixels", "extractor", "extractor_sha256", "statistics_count", "distinct", "crop")


def kept_features(
    images: ImageSet, networks: Sequence[Extractor], folder: Path, look: Callable[[], list[SetFeatures]]
) -> list[SetFeatures]:
    """Return what networks see in a set: from a folder if it is there, else it is looked at and written there.

    Files are named after what decides them: names, sizes and dates of the images, their crop, network and device.

    Args:
        images: A folder of images, or one file of them.
        networks: What looks.
        folder: Where files are, or are made.
        look: Looks at all of the set.

    Returns:
        One for each network, in their order; the same numbers whether they were read or not.

    Raises:
        InputError: If the images are not on the disk, or a file that was kept is not whole.
    """
    paths = [folder / f"{_name(images, network)}.safetensors" for network in networks]
    if all(path.is_file() for path in paths):
        return [_read(path, images, network) for path, network in zip(paths, networks, strict=True)]
    found = look()
    for path, seen in zip(paths, found, strict=True):
        tensors = {name: getattr(seen, name) for name in TENSORS if getattr(seen, name) is not None}
        write_tensors(path, tensors, {"set": json.dumps({name: getattr(seen, name) for name in PLAIN})})
    return found


def _name(images: ImageSet, network: Extractor) -> str:
    source = Path(images.source)
    files = [source / name for name in images.names or ()] if source.is_dir() else [source]
    try:
        known = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise InputError(
            f"{source}: is neither a folder of image files nor one file, so what is seen in it cannot be kept; leave "
            "--keep-features out"
        ) from error
    looked = [__version__, network.name, network.sha256, network.device.type, images.size, images.crop]
    facts = [*looked, str(source.resolve()), list(images.names or ()), known]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read(path: Path, images: ImageSet, network: Extractor) -> SetFeatures:
    tensors, about = read_tensors(path)
    values: dict[str, Any] = {**dict.fromkeys(TENSORS), **json.loads(about["set"]), "source": images.source}
    values |= {name: tensor.to(network.device) for name, tensor in tensors.items()}
    values["size"] = tuple(values["size"])
    return SetFeatures(**values)
