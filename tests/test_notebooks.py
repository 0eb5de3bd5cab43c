"""The notebooks: kept without outputs, and every cell runs and shows what its text says."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.test_project import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def carried_out(name: str, **parameters: Any) -> tuple[dict[str, Any], list[Any]]:
    """Run a notebook with other parameters; return its names, and what each cell shows."""
    names: dict[str, Any] = {}
    shown = []
    for cell in read(ROOT / "notebooks" / name):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), name, "eval"), names))
        if "parameters" in cell["metadata"].get("tags", []):
            assert parameters.keys() <= names.keys()
            names |= parameters
    return names, shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_as_they_are_opened(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    assert (data["nbformat"], data["nbformat_minor"]) == (4, 5)
    assert path.read_text(encoding="utf-8") == json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    assert len({cell["id"] for cell in data["cells"]}) == len(data["cells"])
    code = [cell for cell in data["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert f"({path.name})" in (path.parent / "README.md").read_text(encoding="utf-8")


def test_tokens_of_a_photograph() -> None:
    names, shown = carried_out("tokens.ipynb", lengths=[64, 16], pictures_between=3)
    widths = [item.width for item in shown if isinstance(item, Image.Image)]
    assert widths == [2 * 256, 2 * 3 * 256, 2 * 256, 3 * 256]
    images, (whole, short) = names["images"], names["shorter"]
    errors = [(pictures - images).square().mean() for pictures in (whole, short, images.flip(0))]
    assert errors[0] < errors[1] < errors[2] / 3  # tokens bring detail, but most of it is in the first
    torch.testing.assert_close(names["way"][[0, -1]], whole, atol=1e-3, rtol=0)
    nearer = [(names["mixed"] - other).square().mean() for other in (whole, whole.flip(0))]
    assert nearer[0] != nearer[1]


def test_guidance() -> None:
    names, shown = carried_out("guidance.ipynb", steps=2, scales=[1.0, 3.0], flowers=["rose"])
    assert [item.size for item in shown if isinstance(item, Image.Image)] == [(256, 256), (256, 512), (256, 256)]
    plain, guided = names["rows"]
    torch.testing.assert_close(guided, names["images"], atol=1e-4, rtol=0)  # 3 is the scale that is stored
    assert (plain - guided).abs().mean() > 0.01
    assert names["part"].shape == plain.shape
