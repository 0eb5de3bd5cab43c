"""`softvq evaluate compare` from the command line."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softvq.commands.compare import better_of
from softvq.evaluation.set_figures import FIGURES
from tests.program import Program, contents

Change = Callable[[dict[str, Any]], Any]


def generation_row(scale: float, distance: float, precision: float) -> dict[str, Any]:
    figures = {"frechet_distance": distance, "kernel_distance": -0.5, "kernel_distance_std": 0.25}
    figures |= {"precision": precision, "nearest_distance": float(min(distance, 100)) / 2}
    labels = {"frechet_distance": "FID", "kernel_distance": "KID", "nearest_distance": "distance to the nearest"}
    settings = {"guidance": scale, "steps": 50}
    return {
        "name": "a", "network": "Inception", "settings": settings, "figures": figures, "labels": labels, "warnings": [],
    }  # fmt: skip


def about(count: int = 50) -> dict[str, Any]:
    return {"source": "x", "count": count, "size": [32, 32], "crop": "none", "pixels": "a" * 64, "statistics": None}


def generation(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    provenance = {
        "protocol": "folder", "figures": 1, "samples": [about()], "reference": about(60),
        "extractors": [{"name": "Inception", "sha256": "b" * 64, "resize": "bilinear", "image_size": 299}],
    }  # fmt: skip
    own = [{**generation_row(1, 1.5, 0.75), "settings": {}}]
    result = {"kind": "generation", "protocol": "folder", "rows": list(rows), "validation": own}
    return {**result, "provenance": provenance, **changes}


def reconstruction(psnr: float) -> dict[str, Any]:
    images = {"name": "images", "network": None, "settings": {}, "figures": {"psnr": psnr}, "labels": {"psnr": "PSNR"}}
    latents = {"name": "latents", "network": None, "settings": {}, "labels": {}}
    latents["figures"] = {"bits_per_pixel": 0.5}
    rows = [images, latents, {**generation_row(1, 3.0, 0.5), "settings": {}}]
    return {**generation(*rows), "kind": "reconstruction", "validation": None}


def save(folder: str, result: Any, name: str | None = None) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, name or f"{result['kind']}.json")
    path.write_text(result if isinstance(result, str) else json.dumps(result))
    return path


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    save("one", generation(generation_row(1, 8.25, 0.5), generation_row(2, 4.125, 0.5)))
    save("two", generation(generation_row(1, 5.5, 0.25)))
    return Program(capsys)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"[│|]", line)[1:-1]]


def test_every_result_and_setting_has_a_row_and_the_best_is_marked(program: Program) -> None:
    result = program("evaluate", "compare", "one", "two", "--out", "out")
    assert (result.code, result.err) == (0, "")
    text = Path("out/compare.md").read_text()
    header, _, *lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert header == ["result", "settings", "FID", "KID", "precision", "distance to the nearest"]
    assert lines == [
        ["one", "guidance 1, steps 50", "8.25", "-0.5 ± 0.25", "**0.5**", "4.125"],
        ["one", "guidance 2, steps 50", "**4.125**", "-0.5 ± 0.25", "**0.5**", "2.0625"],
        ["two", "guidance 1, steps 50", "5.5", "-0.5 ± 0.25", "0.25", "2.75"],
        ["validation photographs", "", "1.5", "-0.5 ± 0.25", "0.75", "0.75"],
    ]
    report = json.loads(Path("out/compare.json").read_text())["generation"]
    assert report["protocol"] == "folder"
    assert [column["better"] for column in report["columns"]] == ["lower", "lower", "higher", None]
    assert [row["figures"][0] for row in report["rows"]] == [8.25, 4.125, 5.5, 1.5]
    assert [row["best"][0] for row in report["rows"]] == [False, True, False, False]
    printed = [cells(line) for line in result.out.splitlines() if line.startswith("│")]
    assert "4.125 *" in {cell for line in printed for cell in line}
    assert sum(cell.endswith(" *") for line in printed for cell in line) == 3
    assert "generation, protocol folder" in result.out
    assert "out: compare.md, compare.json" in result.out


def test_kinds_have_tables_of_their_own(program: Program) -> None:
    save("one", reconstruction(20.5))
    save("three", reconstruction(21.5))
    assert program("evaluate", "compare", "one", "two", "three/reconstruction.json", "--out", "out").code == 0
    report = json.loads(Path("out/compare.json").read_text())
    assert list(report) == ["reconstruction", "generation"]
    columns = [(column["network"], column["key"]) for column in report["reconstruction"]["columns"]]
    assert columns[:3] == [(None, "psnr"), (None, "bits_per_pixel"), ("Inception", "frechet_distance")]
    rows = report["reconstruction"]["rows"]
    assert [row["result"] for row in rows] == ["one", "three"]
    assert [row["figures"][:3] for row in rows] == [[20.5, 0.5, 3.0], [21.5, 0.5, 3.0]]
    assert [row["best"][:3] for row in rows] == [[False, False, False], [True, False, False]]  # equal ones are not best
    assert len(report["generation"]["rows"]) == 4


def test_a_stranger_can_say_nothing_in_the_table(program: Program) -> None:
    row = generation_row(1, 2.0, 0.5)
    row["labels"]["frechet_distance"] = "F|D <script> ![p](https://x) **9**"
    save("odd", generation(row))
    assert program("evaluate", "compare", "odd", "two", "--out", "out").code == 0
    expected = r"| F\|D &lt;script&gt; \!\[p\]\(https://x\) \*\*9\*\* |"
    assert expected in Path("out/compare.md").read_text()
    row["labels"]["frechet_distance"] = r"a_b `c` # ~d~ \ & e"
    row["settings"] = {"[x](y)": 1, "steps": None}
    save("<b>", generation(row))
    assert program("evaluate", "compare", "<b>", "two", "--out", "out", "--overwrite").code == 0
    text = Path("out/compare.md").read_text()
    assert r"| a\_b \`c\` \# \~d\~ \\ &amp; e |" in text
    assert r"| &lt;b&gt; | \[x\]\(y\) 1 |" in text


def test_what_is_there_is_left(program: Program) -> None:
    before = contents(Path("two"))
    program.refuses("evaluate", "compare", "one", "--out", "two", names=("two", "already there"))
    assert contents(Path("two")) == before
    assert program("evaluate", "compare", "one", "--out", "two", "--overwrite").code == 0
    assert contents(Path("two")).keys() == {"generation.json", "compare.json", "compare.md"}


def put(*names: str | int, value: Any) -> Change:
    def change(result: dict[str, Any]) -> None:
        place: Any = result
        for name in names[:-1]:
            place = place[name]
        place[names[-1]] = value

    return change


def both_protocols(name: str) -> Change:
    def change(result: dict[str, Any]) -> None:
        result["protocol"] = result["provenance"]["protocol"] = name

    return change


def both(name: str) -> dict[str, Any]:
    result = generation(generation_row(1, 2.0, 0.5))
    both_protocols(name)(result)
    return result


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (both_protocols("adm-256-train50k"), ("protocol", "folder", "adm-256-train50k")),
        (put("provenance", "reference", "pixels", value="c" * 64), ("reference", "aaa", "ccc")),
        (put("provenance", "reference", "count", value=61), ("reference", "60", "61")),
        (put("provenance", "extractors", 0, "sha256", value="d" * 64), ("extractor", "bbb", "ddd")),
        (put("provenance", "samples", 0, "count", value=49), ("samples", "50", "49")),
    ],
)
def test_results_that_must_not_stand_side_by_side(program: Program, change: Change, names: tuple[str, ...]) -> None:
    result = copy.deepcopy(generation(generation_row(1, 2.0, 0.5)))
    change(result)
    save("other", result)
    program.refuses("evaluate", "compare", "one", "other", "--out", "out", names=("cannot be compared", *names))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{", ("no whole JSON",)),
        ("\0\xff", ("no whole JSON",)),
        ("[" * 100_000, ("no whole JSON",)),
        ("[]", ("kind is not",)),
        ('{"kind": "probe"}', ("kind is not",)),
        ('{"kind": "generation", "rows": []}', ("provenance is missing",)),
        (json.dumps(generation(generation_row(1, 2.0, 0.5), protocol="<img>")), ("protocol is none",)),
        (json.dumps(generation(generation_row(1, 2.0, 0.5), protocol="val50k-center256")), ("protocol is none",)),
        (json.dumps(both("nonsense")), ("protocol is none",)),
        (json.dumps(generation()), ("rows",)),
        (json.dumps(generation(3)), ("a row is none",)),
        (json.dumps(generation({**generation_row(1, 2.0, 0.5), "figures": {}})), ("has no figures",)),
        (json.dumps(generation({**generation_row(1, 2.0, 0.5), "labels": {"x": "\ud800"}})), ("no text",)),
        (json.dumps(generation({**generation_row(1, 2.0, 0.5), "labels": {"x": "a\x1b[2J"}})), ("no text",)),
        (json.dumps(generation({**generation_row(1, 2.0, 0.5), "labels": {"x": 3}})), ("no text",)),
        (json.dumps(generation({**generation_row(1, 2.0, 0.5), "settings": {"x": 10**400}})), ("no finite number",)),
        (json.dumps(generation({**generation_row(1, 2.0, 0.5), "settings": {"x": "1"}})), ("no finite number",)),
        (json.dumps(generation({"network": None})), ("settings, figures or labels",)),
        (json.dumps(generation(generation_row(1, float("nan"), 0.5))), ("no finite number",)),
        (json.dumps(generation(generation_row(1, 10**400, 0.5))), ("no finite number",)),
        (json.dumps(generation(generation_row(1, 2.0, 0.5), provenance={"protocol": "folder"})), ("does not say",)),
        (json.dumps(generation(generation_row(1, 2.0, 0.5), validation=3)), ("validation",)),
    ],
)
def test_broken_results_are_one_sentence(program: Program, text: str, names: tuple[str, ...]) -> None:
    path = save("broken", text, "generation.json")
    places = (path.parent,) if "does not say" in names else (path,)
    program.refuses("evaluate", "compare", "broken", names=(*places, *names))


def test_results_that_are_not_there(program: Program) -> None:
    Path("empty").mkdir()
    program.refuses("evaluate", "compare", "empty", names=("empty", "reconstruction.json", "generation.json"))
    program.refuses("evaluate", "compare", "nowhere", names=("nowhere", "cannot be read"))
    program.refuses("evaluate", "compare", "one", "one/generation.json", names=("given twice",))


def test_directions_are_known_for_all_figures() -> None:
    known = {key: better_of(key) for key in FIGURES}
    assert {key for key, better in known.items() if better is None} == {"density"}  # above 1 more is not better
    lower = {key for key, better in known.items() if better == "lower"}
    assert lower == {"frechet_distance", "spatial_frechet_distance", "kernel_distance", "cmmd"}
