"""What comes with softvq: the files of the package, and the licences of what it needs."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".typed", ".json", ".yaml", ".md", ".txt", ".csv", ".jpg", ".safetensors"}
SUFFIXES |= {".html", ".css", ".js", ".svg"}
LARGE = {
    "pretrained/photos-64/model.safetensors",
    "pretrained/flowers-dit/model.safetensors",
    "assets/photos/manifest.csv",
}
"""Files above 100 kB: the models that come with the package, and where its photographs are from."""
FREE = re.compile(r"Apache|MIT|BSD|BSL-1\.0|PSF|Zlib|CC0|ISC|MPL-2\.0|Mozilla Public License 2\.0", re.IGNORECASE)
OF_TORCH = ("nvidia-", "cuda-")
"""NVIDIA's libraries, which torch brings along on Linux; softvq neither names nor ships them."""


def needed() -> dict[str, metadata.Distribution]:
    """Return what softvq needs with all extras for users, as far as it is installed, and what that needs, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [texts for name, texts in project["optional-dependencies"].items() if name != "dev"]
    left = [Requirement(text) for text in sum(extras, project["dependencies"])]
    found: dict[str, metadata.Distribution] = {}
    while left:
        each = left.pop()
        if each.name in found or (each.marker and not each.marker.evaluate({"extra": ""})):
            continue
        try:
            found[each.name] = metadata.distribution(each.name)
        except metadata.PackageNotFoundError:  # of an extra
            continue
        left += [Requirement(text) for text in found[each.name].requires or []]
    return found


def test_everything_that_is_needed_is_free_software() -> None:
    count = 0
    for name, distribution in needed().items():
        if name.startswith(OF_TORCH):
            continue
        facts = distribution.metadata
        kinds = [each for each in facts.get_all("Classifier", []) if each.startswith("License")]
        licence = facts.get("License-Expression") or " ".join(kinds) or facts.get("License", "")
        assert FREE.search(licence), f"{name}: {licence[:80]}"
        assert not re.search(r"\bA?GPL|Proprietary|NonCommercial", licence), f"{name}: {licence[:80]}"
        count += 1
    assert count > 20


def test_the_package_has_no_tests_and_little_data() -> None:
    """hatchling packs what is below `softvq/` and nothing else, and of that what git does not ignore."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["softvq"]}
    assert set(build) == {"targets"}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "softvq"]
    if (ROOT / ".git").exists():
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        paths = [ROOT / name for name in names]
    else:  # a source archive
        paths = [path for path in (ROOT / "softvq").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    large = {str(path.relative_to(ROOT / "softvq")) for path in paths if path.stat().st_size > 100_000}
    assert large == LARGE
    for path in paths:
        assert path.suffix in SUFFIXES, path
        assert not re.search(r"(^|/)(tests?|test_[^/]*)(/|$)", path.relative_to(ROOT).as_posix()), path
