"""Named rules of what is compared with what, so that a figure can stand beside others; all else is refused.

A Fréchet distance depends on the reference, on how images were cropped, on how many there are, and on the network. The
protocols are those of published tables; `folder` is for everything that is not to be compared with them.
"""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from softvq import __version__
from softvq.errors import InputError
from softvq.evaluation.extractors import INCEPTION_SHA, Extractor
from softvq.evaluation.image_sets import ImageSet
from softvq.evaluation.set_features import SetFeatures

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "check_different",
    "check_protocol",
    "comparable",
    "described",
    "provenance",
]

Purpose = Literal["generation", "reconstruction"]
ReferenceKind = Literal["adm statistics", "validation photographs", "images"]
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")
FEWEST = 2
FIGURES_VERSION = 1  # rises when a figure of the same images changes by more than rounding
PUBLISHED_COUNT = 50_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What figures under one name have in common; None leaves something to the user."""

    name: str
    """As `--protocol` has it."""
    about: str
    """What is compared with what, in a sentence."""
    sample_count: int | None
    """Images that are judged."""
    reference_count: int | None
    """Images of the reference; beside statistics, those that precision and recall are about."""
    size: int | None
    """Side of all images in pixels."""
    crop: bool
    """Whether photographs of the reference are centre-cropped to `size` as ADM does."""
    extractor: str | None
    """The kind of the network."""
    extractor_sha: str | None
    """First digits of the SHA-256 of its weights."""
    reference: ReferenceKind
    """What the reference has to be."""
    for_what: tuple[Purpose, ...]
    """What may be judged."""


PROTOCOLS: dict[str, Protocol] = {
    each.name: each
    for each in (
        Protocol(
            name="adm-256-train50k",
            about="50,000 samples against ADM's statistics of the ImageNet training set at 256 px",
            sample_count=PUBLISHED_COUNT,
            reference_count=10_000,
            size=256,
            crop=False,
            extractor="inception",
            extractor_sha=INCEPTION_SHA,
            reference="adm statistics",
            for_what=("generation",),
        ),
        Protocol(
            name="val50k-center256",
            about="50,000 images against the ImageNet validation photographs, cropped to 256 px as ADM does",
            sample_count=PUBLISHED_COUNT,
            reference_count=PUBLISHED_COUNT,
            size=256,
            crop=True,
            extractor="inception",
            extractor_sha=INCEPTION_SHA,
            reference="validation photographs",
            for_what=("reconstruction", "generation"),
        ),
        Protocol(
            name="folder",
            about="any two sets of images of one size; beside published figures they mean nothing",
            sample_count=None,
            reference_count=None,
            size=None,
            crop=False,
            extractor=None,
            extractor_sha=None,
            reference="images",
            for_what=("reconstruction", "generation"),
        ),
    )
}
"""By name."""


def check_protocol(
    protocol: Protocol,
    *,
    what: Purpose,
    samples: ImageSet,
    reference: ImageSet | SetFeatures,
    networks: Sequence[Extractor],
) -> list[str]:
    """Refuse what a protocol does not allow, before anything is computed.

    Args:
        protocol: One of `PROTOCOLS`.
        what: What is judged.
        samples: The images that are judged.
        reference: What they are compared with; statistics are `SetFeatures` as `adm_statistics` gives them.
        networks: That both are seen by.

    Returns:
        Warnings: sentences on what is allowed but misleads.

    Raises:
        InputError: If something is of another kind, size, number or network than the protocol says.
    """
    if what not in protocol.for_what:
        raise InputError(
            f"{protocol.name} is for {' and '.join(protocol.for_what)} only: a {what} compared with the training set "
            "has a distance several times that from its own photographs; use val50k-center256 or folder"
        )
    _check_networks(protocol, networks)
    _check_count(protocol, "samples", samples.source, samples.count, protocol.sample_count)
    _check_size(protocol, samples.source, samples.size)
    warnings = _check_reference(protocol, what, reference)
    if reference.size is not None and reference.size != samples.size:
        raise InputError(
            f"{samples.source}: images are {_by(samples.size)} (height x width), those of {reference.source} "
            f"{_by(reference.size)}; give sets of one size, or crop both with --crop and --size N"
        )
    if what == "generation" and isinstance(reference, ImageSet) and _is_same_file(samples, reference):
        raise InputError(f"{samples.source}: is compared with itself; give other images, or another reference")
    if protocol.sample_count is None and samples.count < PUBLISHED_COUNT and any(n.is_fid_inception for n in networks):
        warnings.append(
            f"{samples.count} samples: FID falls with their number, so compare it only with that of as many, and never "
            f"with published ones of {PUBLISHED_COUNT}"
        )
    return warnings


def check_different(samples: SetFeatures, reference: SetFeatures) -> None:
    """Refuse generated samples that are the reference's own images, whatever they are kept in.

    Args:
        samples: What is judged.
        reference: What it is compared with.

    Raises:
        InputError: If both have the same pixels.
    """
    if samples.pixels is not None and samples.pixels == reference.pixels:
        raise InputError(
            f"{samples.source}: holds exactly the images of {reference.source}, so there is nothing to compare; give "
            "other images, or another reference"
        )


def comparable(results: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> None:
    """Refuse results that must not stand side by side.

    Args:
        results: Of one kind, as the commands write them, each with what `provenance` gave.
        names: What to call them; None numbers them from 1.

    Raises:
        InputError: If they differ in protocol, networks, reference, size or number of images; the first such field is
            named.
    """
    first: dict[str, Any] = {}
    titles = list(names or (f"result {number}" for number in range(1, len(results) + 1)))
    for title, result in zip(titles, results, strict=True):
        fields = _compared(result, title)
        first = first or fields
        for field, value in fields.items():
            if value != first[field]:
                raise InputError(
                    f"{titles[0]} and {title} cannot be compared: {field} is {first[field]} and {value}; evaluate both "
                    "in the same way"
                )


def described(found: SetFeatures | ImageSet, *, pixels: str | None = None) -> dict[str, Any]:
    """Return what tells a set of images from others, as plain data for `provenance`.

    Args:
        found: What was seen, or what only was read.
        pixels: The `pixel_fingerprint` of what only was read.

    Returns:
        `source`, `count`, `size` (height and width), `crop`, `pixels`, `statistics`, `distinct`; None for what is not
        known.
    """
    is_seen = isinstance(found, SetFeatures)
    return {
        "source": found.source,
        "count": found.count,
        "size": None if found.size is None else list(found.size),
        "crop": found.crop,
        "pixels": found.pixels if is_seen else pixels,
        "statistics": found.statistics if is_seen else None,
        "distinct": found.distinct if is_seen else None,
    }


def provenance(
    protocol: Protocol,
    *,
    networks: Sequence[Extractor],
    samples: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any],
    machine: str,
    model: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    validation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a reader needs to get the same figures again, and `comparable` to refuse others.

    Args:
        protocol: That was checked.
        networks: That everything was seen by.
        samples: As `described` gives them, one for each setting; the reconstructions where there is a model of them.
        reference: As `described` gives it.
        machine: What it ran on.
        model: What was judged: its name and its fingerprint, if there was one.
        recipe: How it was sampled.
        validation: As `described` gives it.

    Returns:
        Plain data for JSON.
    """
    return {
        "protocol": protocol.name,
        "about": protocol.about,
        "figures": FIGURES_VERSION,
        "versions": _versions(),
        "machine": machine,
        "model": None if model is None else dict(model),
        "recipe": None if recipe is None else dict(recipe),
        "samples": [dict(each) for each in samples],
        "reference": dict(reference),
        "validation": None if validation is None else dict(validation),
        "extractors": [
            {"name": each.name, "sha256": each.sha256, "resize": each.resize, "image_size": each.image_size}
            for each in networks
        ],
    }


def _versions() -> dict[str, str]:
    found = {"softvq": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # put on the path by hand
            found[name] = "unknown"
    return found


def _check_networks(protocol: Protocol, networks: Sequence[Extractor]) -> None:
    if protocol.extractor_sha is None:
        return
    for network in networks:
        if not network.is_fid_inception or not network.sha256.startswith(protocol.extractor_sha):
            raise InputError(
                f"{protocol.name} looks through the Inception of FID (SHA-256 {protocol.extractor_sha}...), not "
                f"{network.name} ({network.sha256[:8]}...); give --features inception=FILE, or use --protocol folder"
            )
    if len(networks) != 1:
        raise InputError(
            f"{protocol.name} looks through the Inception of FID, but {len(networks)} networks are given; give "
            "--features inception=FILE alone"
        )


def _check_count(protocol: Protocol, what: str, source: str, count: int, expected: int | None) -> None:
    if expected is not None and count != expected:
        raise InputError(
            f"{source}: holds {count} images, but {protocol.name} takes exactly {expected} as {what}; give so many, or "
            "use --protocol folder"
        )
    if count < FEWEST:
        raise InputError(f"{source}: holds {count} image, expected at least {FEWEST} for figures about a set")


def _check_size(protocol: Protocol, source: str, size: tuple[int, int]) -> None:
    if protocol.size is not None and size != (protocol.size, protocol.size):
        raise InputError(
            f"{source}: images are {_by(size)} (height x width), but {protocol.name} is about "
            f"{_by((protocol.size, protocol.size))}; make them of that size, since resizing changes every figure"
        )


def _check_reference(protocol: Protocol, what: Purpose, reference: ImageSet | SetFeatures) -> list[str]:
    statistics = reference.statistics if isinstance(reference, SetFeatures) else None
    if protocol.reference == "adm statistics":
        return _check_statistics(protocol, reference, statistics)
    if statistics is not None and (protocol.reference == "validation photographs" or what == "reconstruction"):
        raise InputError(
            f"{reference.source}: holds statistics of a training set, but {protocol.name} compares "
            f"{'reconstructions ' if what == 'reconstruction' else ''}with photographs; give those themselves, as "
            "distances from the training set are others (rFID is about 1.8 instead of 0.6)"
        )
    if statistics is not None:
        return [
            f"{reference.source}: that its statistics are of images of this size and of this network is taken on trust"
        ]
    _check_count(protocol, "reference", reference.source, reference.count, protocol.reference_count)
    if reference.size is not None:
        _check_size(protocol, reference.source, reference.size)
    if protocol.reference != "validation photographs" or not isinstance(reference, ImageSet):
        return []
    if reference.kind not in ("folder", "npz"):
        raise InputError(f"{reference.source}: is made by a network, but {protocol.name} compares with photographs")
    if protocol.crop and reference.kind == "folder" and reference.crop == "none":
        raise InputError(
            f"{reference.source}: its photographs are not cropped, but {protocol.name} crops them to {protocol.size} "
            "px as ADM does; give --crop"
        )
    return [
        f"{reference.source}: that these are the validation photographs of ImageNet"
        f"{', cropped as ADM does,' if reference.crop == 'none' else ''} is taken on trust"
    ]


def _check_statistics(protocol: Protocol, reference: ImageSet | SetFeatures, statistics: str | None) -> list[str]:
    if not isinstance(reference, SetFeatures) or statistics is None:
        raise InputError(
            f"{reference.source}: holds images, but {protocol.name} compares with statistics of the whole training "
            "set; give ADM's .npz file with mu, sigma, mu_s and sigma_s, or use --protocol folder"
        )
    if reference.spatial_mean is None:
        raise InputError(
            f"{reference.source}: holds no mu_s and sigma_s, which {protocol.name} needs; fetch ADM's own file"
        )
    trusted = [f"{reference.source}: that its statistics are ADM's, of the ImageNet training set, is taken on trust"]
    if not reference.count:
        return [*trusted, f"{reference.source}: holds statistics but no images, so there is no precision and recall"]
    _check_count(
        protocol, "reference for precision and recall", reference.source, reference.count, protocol.reference_count
    )
    if reference.size is not None:
        _check_size(protocol, reference.source, reference.size)
    return trusted


def _is_same_file(samples: ImageSet, reference: ImageSet) -> bool:
    if "memory" in (samples.kind, reference.kind) or samples.crop != reference.crop:
        return False
    return Path(samples.source).resolve() == Path(reference.source).resolve()


def _compared(result: Mapping[str, Any], title: str) -> dict[str, Any]:
    """Return the fields that must agree, the most telling first."""
    try:
        origin = result["provenance"]
        reference, samples = origin["reference"], origin["samples"]
        fields = {
            "kind": result["kind"],
            "protocol": result["protocol"],
            "version of the figures": origin.get("figures"),
            "extractor": sorted((each["name"], each["sha256"], each["resize"]) for each in origin["extractors"]),
            "reference": " and ".join(each for each in (reference["statistics"], reference["pixels"]) if each),
            "number of reference images": reference["count"],
            "size of images": " and ".join(sorted({_by(each["size"]) for each in samples})),
            "number of samples": sorted({samples[0]["count"], *(each["count"] for each in samples)}),
            "perceptual distance": origin.get("perceptual"),
        }
    except (IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"{title} does not say what was compared with what ({type(error).__name__}: {error}); evaluate again"
        ) from error
    if not fields["reference"]:
        raise InputError(f"{title} has no fingerprint of its reference; evaluate again")
    return fields


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
