"""Statistics of a reference set in the files that ADM (arXiv:2105.05233) shares, which published FIDs are of."""

import dataclasses
import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softvq.errors import InputError
from softvq.evaluation.extractors import Extractor
from softvq.evaluation.npz_images import ARRAY, MAX_HEADER_BYTES, archive_errors, array_header, open_npz
from softvq.evaluation.set_features import SetFeatures

__all__ = ["adm_statistics", "is_adm_statistics", "with_images"]

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
ROUNDING = 1e-5
"""By so much of its largest entry a stored covariance may differ from its transpose: float32 does not hold more."""


def is_adm_statistics(source: Path | str) -> bool:
    """Return whether a file is an .npz archive with mean and covariance of features, as ADM shares references.

    Args:
        source: What the user gave; anything else than such a file is not one.

    Returns:
        Whether `adm_statistics` is to read it.
    """
    path = Path(source)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return not {"mu.npy", "sigma.npy"}.isdisjoint(archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def adm_statistics(path: Path | str, network: Extractor) -> SetFeatures:
    """Read the statistics of a reference set that ADM (arXiv:2105.05233) shares as an .npz file.

    These are `mu` and `sigma` of the features, `mu_s` and `sigma_s` of the spatial features if they are there. Images
    in `arr_0` are counted, not read: `open_images` reads them, and `with_images` joins what they give.

    Args:
        path: Of the file; nothing in it is unpickled.
        network: That the statistics are taken to be of, which the file does not say: only dimensions can be checked.

    Returns:
        The statistics on the network's device, without features.

    Raises:
        InputError: If the file is no whole archive, or statistics are missing, of other dimensions, not finite, or no
            covariance.
    """
    path = Path(path)
    shapes = {"mu": (network.dim,), "sigma": (network.dim,) * 2}
    shapes |= {"mu_s": (network.spatial_dim,), "sigma_s": (network.spatial_dim,) * 2}
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, expected an .npz file' if path.is_dir() else 'no such file'}")
    with archive_errors(f"{path}: is no whole .npz file"), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        wanted = STATISTICS if members & set(STATISTICS[2:]) else STATISTICS[:2]
        missing = [name for name in wanted if name not in members]
        if missing:
            raise InputError(f"{path}: holds no {' and no '.join(missing)}, expected {', '.join(wanted)} as of ADM")
        found = {name: _statistic(path, archive, name, shapes[name], network) for name in wanted}
    images = open_npz(path) if ARRAY in members else None
    digest = hashlib.sha256()
    for name in wanted:
        digest.update(name.encode() + found[name].tobytes())
    tensors = {name: torch.from_numpy(array).to(network.device) for name, array in found.items()}
    return SetFeatures(
        source=str(path),
        count=0 if images is None else images.count,
        size=None if images is None else (images.height, images.width),
        pixels=None,
        extractor=network.name,
        extractor_sha256=network.sha256,
        mean=tensors["mu"],
        covariance=tensors["sigma"],
        spatial_mean=tensors.get("mu_s"),
        spatial_covariance=tensors.get("sigma_s"),
        features=None,
        logits=None,
        statistics_count=None,
        statistics=digest.hexdigest(),
    )


def with_images(statistics: SetFeatures, images: SetFeatures) -> SetFeatures:
    """Return stored statistics with the features of the images that lie beside them, for precision and the like.

    Args:
        statistics: As `adm_statistics` gives them.
        images: Of the same network.

    Returns:
        Moments of the one, all else of the other.

    Raises:
        InputError: If the networks differ.
    """
    if statistics.extractor_sha256 != images.extractor_sha256:
        raise InputError(
            f"{statistics.source}: its statistics are of {statistics.extractor}, its images are seen by "
            f"{images.extractor}; use one network for both"
        )
    return dataclasses.replace(
        statistics,
        count=images.count,
        size=images.size,
        pixels=images.pixels,
        features=images.features,
        logits=images.logits,
        distinct=images.distinct,
        order=images.order,
        crop=images.crop,
    )


def _statistic(path: Path, archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], network: Extractor) -> Any:
    """Read one array of a known shape, in float64."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        head = io.BytesIO(member.read(MAX_HEADER_BYTES))
        found, is_fortran, dtype = array_header(head)
        if found != shape or dtype.kind != "f":
            raise InputError(
                f"{path}: {name} is {dtype} {list(found)}, expected floats {list(shape)} as {network.name} gives them"
            )
        length = math.prod(shape) * dtype.itemsize
        if info.file_size != head.tell() + length:  # so that no more is unfolded than there is room for
            raise InputError(f"{path}: {name} holds {info.file_size} bytes, not what its shape says; fetch it again")
        data = head.read()
        data += member.read(length - len(data))
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if is_fortran else "C").astype(np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name} holds numbers that are not finite; fetch it again")
    if array.ndim == 2:
        largest = np.abs(array).max()
        if np.abs(array - array.T).max() > ROUNDING * largest or array.diagonal().min() < 0:
            raise InputError(
                f"{path}: {name} is no covariance, which is symmetric with variances from 0; fetch it again"
            )
        array = (array + array.T) / 2
    return np.ascontiguousarray(array)
