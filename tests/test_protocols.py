"""Protocols refuse what must not be compared, each with one sentence that says why and what to do."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softvq.arguments import evaluation as arguments
from softvq.commands.evaluate_shared import networks_of, print_figures
from softvq.errors import InputError
from softvq.evaluation.image_sets import ImageSet, in_memory, open_images
from softvq.evaluation.protocols import (
    PROTOCOLS,
    check_different,
    check_protocol,
    comparable,
    described,
    provenance,
)
from softvq.evaluation.set_features import SetFeatures, set_features
from softvq.evaluation.set_figures import set_figures
from tests.looking import inception, network, pictures, save_folder, save_npz, seen

ADM, VALIDATION, FOLDER = (PROTOCOLS[name] for name in ("adm-256-train50k", "val50k-center256", "folder"))
FID = inception()
CROPPED = "centre 256 (ADM)"


def images(
    source: str = "samples", count: int = 50_000, size: tuple[int, int] = (256, 256), **changes: Any
) -> ImageSet:
    """Return a set that says what it holds, but cannot be read: nothing is to be computed yet."""
    fields: dict[str, Any] = {"count": count, "size": size, "kind": "npz", "items": unreadable}
    return dataclasses.replace(in_memory(pictures(1), source), **(fields | changes))


def unreadable(start: int, stop: int) -> Any:
    raise AssertionError("a protocol read images")


def photographs(**changes: Any) -> ImageSet:
    return images(**({"source": "val", "kind": "folder", "crop": CROPPED} | changes))


def statistics(**changes: Any) -> SetFeatures:
    """Return what ADM's file holds, in as far as a protocol looks at it."""
    known = {"features": None, "statistics_count": None, "statistics": "cd" * 32, "count": 10_000, "size": (256, 256)}
    spatial = {"spatial_mean": torch.zeros(3).double(), "spatial_covariance": torch.eye(3).double()}
    return seen(torch.randn(9, 6), FID, "adm.npz", **{**known, **spatial, **changes})


def test_what_is_right_passes() -> None:
    (trusted,) = check(ADM, reference=statistics())
    assert trusted == "adm.npz: that its statistics are ADM's, of the ImageNet training set, is taken on trust"
    (trusted,) = check(VALIDATION)
    assert trusted == "val: that these are the validation photographs of ImageNet is taken on trust"
    assert check(VALIDATION, what="reconstruction") == [trusted]
    (trusted,) = check(VALIDATION, reference=images("val.npz"))
    assert "of ImageNet, cropped as ADM does, is taken on trust" in trusted
    assert check(FOLDER, networks=[network()], samples=images(count=2), reference=photographs(count=3)) == []


def check(protocol: Any, **changes: Any) -> list[str]:
    given: dict[str, Any] = {"what": "generation", "samples": images(), "reference": photographs(), "networks": [FID]}
    return check_protocol(protocol, **(given | changes))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "adm: reconstructions": (ADM, {"what": "reconstruction"}, "is for generation only: .* use val50k-center256"),
    "adm: too few": (ADM, {"samples": images(count=49_999)}, "samples: holds 49999 images, but .* exactly 50000"),
    "adm: too many": (ADM, {"samples": images(count=50_001)}, "samples: holds 50001 images, but .* exactly 50000"),
    "adm: other size": (ADM, {"samples": images(size=(256, 128))}, "samples: images are 256x128 .* about 256x256"),
    "adm: photographs": (ADM, {}, "val: holds images, but .* statistics of the whole training set"),
    "adm: seen photographs": (ADM, {"reference": statistics(statistics=None)}, "adm.npz: holds images, but"),
    "adm: no spatial": (ADM, {"reference": statistics(spatial_mean=None)}, "adm.npz: holds no mu_s and sigma_s"),
    "adm: other images": (
        ADM,
        {"reference": statistics(count=5000)},
        "adm.npz: holds 5000 images, but .* exactly 10000",
    ),
    "adm: small images": (ADM, {"reference": statistics(size=(64, 64))}, "adm.npz: images are 64x64"),
    "adm: other network": (
        ADM,
        {"networks": [network()]},
        r"not Products \(abababab\.\.\.\); give --features inception",
    ),
    "adm: other weights": (
        ADM,
        {"networks": [inception(name="Inception with the weights 12345678", sha256="12345678" * 8)]},
        r"not Inception with the weights 12345678",
    ),
    "adm: name alone": (ADM, {"networks": [inception(is_fid_inception=False)]}, "not Inception"),
    "adm: no network": (ADM, {"networks": []}, "0 networks are given"),
    "adm: two networks": (ADM, {"networks": [FID, FID]}, "2 networks are given"),
    "val: statistics": (
        VALIDATION,
        {"reference": statistics()},
        r"adm.npz: holds statistics .* about 1\.8 instead of 0\.6",
    ),
    "val: statistics for rFID": (
        VALIDATION,
        {"reference": statistics(), "what": "reconstruction"},
        "adm.npz: holds statistics of a training set, but .* reconstructions with photographs",
    ),
    "val: too few": (
        VALIDATION,
        {"reference": photographs(count=10_000)},
        "val: holds 10000 images, but .* exactly 50000",
    ),
    "val: made by a network": (VALIDATION, {"reference": images("val", kind="latents")}, "val: is made by a network"),
    "val: in memory": (VALIDATION, {"reference": images("val", kind="memory")}, "val: is made by a network"),
    "val: too few samples": (VALIDATION, {"samples": images(count=5)}, "samples: holds 5 images"),
    "val: not cropped": (VALIDATION, {"reference": photographs(crop="none")}, "val: its photographs are not cropped"),
    "val: other size": (
        VALIDATION,
        {"reference": photographs(size=(512, 512))},
        "val: images are 512x512 .* about 256x256",
    ),
    "val: other network": (VALIDATION, {"networks": [FID, network()]}, "not Products"),
    "folder: one image": (FOLDER, {"samples": images(count=1)}, "samples: holds 1 image, expected at least 2"),
    "folder: one photograph": (FOLDER, {"reference": photographs(count=1)}, "val: holds 1 image, expected at least 2"),
    "folder: two sizes": (
        FOLDER,
        {"samples": images(size=(64, 64))},
        "samples: images are 64x64 .* those of val 256x256",
    ),
    "folder: statistics of two sizes": (
        FOLDER,
        {"samples": images(size=(64, 64)), "reference": statistics()},
        "those of adm.npz 256x256",
    ),
    "folder: training statistics for rFID": (
        FOLDER,
        {"reference": statistics(), "what": "reconstruction"},
        "adm.npz: holds statistics of a training set",
    ),
    "folder: itself": (
        FOLDER,
        {"samples": images("a/../a.npz"), "reference": images("a.npz")},
        "is compared with itself",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_wrong_is_refused_in_one_sentence(case: str) -> None:
    protocol, changes, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        check(protocol, **changes)
    text = str(caught.value)
    assert "\n" not in text
    assert not text.endswith(".")
    assert ". " not in text.replace("...", "")


def test_what_misleads_is_warned_of() -> None:
    (warning,) = check(FOLDER, samples=images(count=5000))
    assert warning.startswith("5000 samples: FID falls with their number")
    _, warning = check(ADM, reference=statistics(count=0, size=None))
    assert "no precision and recall" in warning
    (warning,) = check(FOLDER, reference=statistics())
    assert "taken on trust" in warning


def test_reconstructions_may_lie_where_the_photographs_do() -> None:
    both = images("a.npz")
    assert check(FOLDER, what="reconstruction", samples=both, reference=both) == []


def test_the_command_line_offers_all_protocols() -> None:
    assert sorted(arguments.PROTOCOLS) == sorted(PROTOCOLS)
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())


def test_samples_with_the_reference_s_pixels_are_refused(tmp_path: Path) -> None:
    pixels, look = pictures(12), network()
    folder, file = save_folder(tmp_path / "photographs", pixels), save_npz(tmp_path / "samples.npz", pixels.flip(0))
    reference, copied = (set_features(open_images(path), [look])[0] for path in (folder, file))
    with pytest.raises(InputError, match=r"samples\.npz: holds exactly the images of .*photographs"):
        check_different(copied, reference)
    other = pixels.clone()
    other[3, 0, 0, 0] ^= 1
    check_different(set_features(in_memory(other, "other"), [look])[0], reference)
    nobody = statistics()
    check_different(nobody, nobody)


def result() -> dict[str, Any]:
    look = network()
    reference, samples = (set_features(in_memory(pictures(12, seed), "x"), [look])[0] for seed in (0, 1))
    found = set_figures(reference, samples, look)
    row = {"name": "x", "network": look.name, "settings": {}, "figures": found.values, "labels": found.labels}
    about = provenance(
        FOLDER,
        networks=[look],
        samples=[described(samples)],
        reference=described(reference),
        machine="a machine",
        model={"name": "model", "fingerprint": "ef"},
    )
    whole = {"kind": "generation", "protocol": "folder", "rows": [row], "validation": None, "provenance": about}
    return json.loads(json.dumps(whole))  # as it is read


def changed(whole: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    whole = copy.deepcopy(whole)
    *parents, last = path.split(".")
    part: Any = whole
    for name in parents:
        part = part[int(name) if name.isdigit() else name]
    part[last] = value
    return whole


def test_provenance_says_what_was_compared_with_what() -> None:
    about = result()["provenance"]
    assert about["versions"].keys() >= {"softvq", "torch", "torchvision", "timm", "numpy", "pillow", "python"}
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert about["extractors"] == [{"name": "Products", "sha256": "ab" * 32, "resize": "none", "image_size": 8}]
    assert about["reference"]["count"] == about["samples"][0]["distinct"] == 12
    assert len(about["reference"]["pixels"]) == 64
    assert about["reference"]["pixels"] != about["samples"][0]["pixels"]
    assert (about["protocol"], about["machine"], about["model"]["fingerprint"]) == ("folder", "a machine", "ef")


def test_a_set_that_was_only_read_is_described_alike() -> None:
    pixels = in_memory(pictures(12), "x")
    (found,) = set_features(pixels, [network()])
    assert described(pixels, pixels=found.pixels) | {"distinct": 12} == described(found)


def test_results_of_one_kind_may_stand_side_by_side() -> None:
    one = result()
    other = changed(changed(one, "provenance.model.name", "other"), "provenance.samples.0.pixels", "ff" * 32)
    comparable([one])
    comparable([one, other, changed(one, "provenance.versions.torch", "1.0")])
    comparable([])


MIXED = {
    "kind": ("kind", "reconstruction", "kind is generation and reconstruction"),
    "protocol": ("protocol", "val50k-center256", "protocol is folder and val50k-center256"),
    "weights": ("provenance.extractors.0.sha256", "cd" * 32, "extractor is .*abab.* and .*cdcd"),
    "network": ("provenance.extractors.0.name", "Other", "extractor is .*Products.* and .*Other"),
    "resize": ("provenance.extractors.0.resize", "bilinear", "extractor is .*none.* and .*bilinear"),
    "reference": ("provenance.reference.pixels", "00" * 32, "reference is .* and 0000"),
    "statistics": ("provenance.reference.statistics", "00" * 32, "reference is .* and 0000.* and"),
    "figures": ("provenance.figures", 2, "version of the figures is 1 and 2"),
    "perceptual": ("provenance.perceptual", {"name": "st-lpips", "sha256": "ab"}, "perceptual distance is None and"),
    "reference count": ("provenance.reference.count", 13, "number of reference images is 12 and 13"),
    "size": ("provenance.samples.0.size", [16, 16], "size of images is 8x8 and 16x16"),
    "count": ("provenance.samples.0.count", 24, r"number of samples is \[12\] and \[24\]"),
}


@pytest.mark.parametrize("case", list(MIXED))
def test_a_mixture_is_refused_by_its_first_difference(case: str) -> None:
    path, value, message = MIXED[case]
    one = result()
    with pytest.raises(
        InputError, match=f"^result 1 and result 3 cannot be compared: {message}[^.]*; evaluate both in the same"
    ):
        comparable([one, one, changed(one, path, value)])


def test_every_set_of_samples_and_both_prints_of_a_reference_count() -> None:
    one = changed(result(), "provenance.reference.statistics", "ab" * 32)
    other = changed(one, "provenance.reference.pixels", "00" * 32)
    with pytest.raises(InputError, match=r"reference is (ab){32} and [0-9a-f]{64} and (ab){32} and 0{64}"):
        comparable([one, other])
    sample = one["provenance"]["samples"][0]
    two = changed(one, "provenance.samples", [sample, dict(sample)])
    with pytest.raises(InputError, match="size of images is 8x8 and 16x16 and 8x8"):
        comparable([two, changed(two, "provenance.samples.1.size", [16, 16])])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("provenance", {}),
        ("provenance.reference", None),
        ("provenance.samples", []),
        ("provenance.extractors", [{"name": "x"}]),
        ("provenance.reference.pixels", None),
    ],
)
def test_results_that_do_not_say_enough_are_refused(path: str, value: Any) -> None:
    one = result()
    with pytest.raises(InputError, match=r"^result 2 (does not say|has no fingerprint).*evaluate again$"):
        comparable([one, changed(one, path, value)])


# what the commands share


def test_networks_are_built_from_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def built(kind: str, *, weights: str | None, device: torch.device) -> Any:
        asked.append((kind, weights))
        return network(name=f"{kind} {weights}")

    monkeypatch.setattr("softvq.commands.evaluate_shared.extractor", built)
    cpu = torch.device("cpu")
    assert len(networks_of(["inception=/a=b.pth", "timm:resnet18"], cpu, FOLDER.name)) == 2
    assert networks_of([], cpu) == []
    networks_of([], cpu, ADM.name)
    networks_of(["lite0"], cpu, ADM.name)
    assert asked == [("inception", "/a=b.pth"), ("timm:resnet18", None), ("inception", None), ("lite0", None)]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (["lite9"], "kind is 'lite9', expected"),
        (["inception="], "'inception=', expected KIND or KIND=WEIGHTS"),
        (["=x"], "'=x', expected KIND"),
        ([""], "'', expected KIND"),
    ],
)
def test_networks_that_are_none_are_refused(features: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        networks_of(features, torch.device("cpu"))


@pytest.mark.parametrize(
    ("sha256", "message"), [("ab" * 32, "Products twice; give"), ("cd" * 32, "two networks of the name Products")]
)
def test_networks_that_cannot_be_told_apart_are_refused(
    sha256: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([network(), network(sha256=sha256)])
    monkeypatch.setattr("softvq.commands.evaluate_shared.extractor", lambda *given, **options: next(found))
    with pytest.raises(InputError, match=message):
        networks_of(["timm:a", "timm:a=x"], torch.device("cpu"))


def test_figures_are_printed_beside_those_of_validation(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"frechet_distance": 12.0, "inception_score": 3.25, "inception_score_std": 0.5, "precision": 0.75}
    labels = {"frechet_distance": "FID [b]", "inception_score": "IS", "inception_score_std": "no"}
    row = {
        "name": "x",
        "network": "Inception",
        "settings": {},
        "figures": figures,
        "labels": labels,
        "warnings": ["few"],
        "ratios": {"frechet_distance": 1.5},
    }
    own = {**row, "figures": {"frechet_distance": 8.0}, "warnings": ["few", "fewer"]}
    print_figures([row], [own], title="figures")
    out, messages = capsys.readouterr()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert lines == [["FID [b]", "12", "8", "1.500"], ["IS", "3.25 ± 0.5", "", ""], ["precision", "0.75", "", ""]]
    assert messages == "warning: few\nwarning: fewer\n"
    print_figures([row, {**row, "name": "y"}], title="figures")
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [line[0] for line in lines] == ["x", "", "", "y", "", ""]
    assert lines[1] == ["", "IS", "3.25 ± 0.5"]
