"""The house: what importing costs, how long things may be, what may stand nowhere, and that the papers agree."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import softvq

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "softvq"
MODULES = sorted(PACKAGE.rglob("*.py"))
OTHERS = sorted(
    path for name in ("tests", "benchmarks", "experiments", "scripts") for path in (ROOT / name).rglob("*.py")
)
HEAVY = {"torch", "torchvision", "timm", "torchmetrics", "numpy", "scipy", "PIL", "huggingface_hub", "tensorboard"}
TEXT_SUFFIXES = {".cff", ".md", ".py", ".toml", ".txt", ".yaml", ".yml", ""}


def run(code: str, tmp_path: Path) -> str:
    """Run Python code in a process and a folder of its own and return what it printed."""
    environment = {"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def tracked_files() -> list[Path]:
    """Return every file that is, or would be, in the repository."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        paths = [ROOT / name for name in names]
    else:  # a source archive
        paths = [path for path in ROOT.rglob("*") if not {".venv", "__pycache__"} & set(path.parts)]
    return [path for path in paths if path.is_file()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def test_import_is_light_and_without_effects(tmp_path: Path) -> None:
    code = """
import os, random, signal, sys, threading, warnings
def state():
    return (dict(os.environ), random.getstate(), list(warnings.filters), threading.active_count(), os.getcwd(),
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.path[:], os.listdir("."))
before = state()
import softvq
softvq.InputError, softvq.__version__, dir(softvq)
assert state() == before
print(*sys.modules)
"""
    loaded = {name.partition(".")[0] for name in run(code, tmp_path).split()}
    assert "softvq" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "tokenizer", "--help"], ["encode", "--help"]]
)
def test_help_is_light(arguments: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from softvq.cli import main
assert main({arguments!r}) == 0
print("MODULES", *sys.modules)
"""
    text, _, modules = run(code, tmp_path).partition("MODULES")
    assert "softvq" in text
    assert not {name.partition(".")[0] for name in modules.split()} & HEAVY


def test_the_entry_point_is_the_module(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.argv = ['softvq', '--version']; runpy.run_module('softvq', run_name='__main__')"
    assert softvq.__version__ in run(code, tmp_path)


def test_public_names_exist() -> None:
    assert len(softvq.__all__) <= 20
    for name in softvq.__all__:
        assert hasattr(softvq, name)
        assert name in dir(softvq)
    with pytest.raises(AttributeError, match="module 'softvq' has no attribute 'nothing'"):
        _ = softvq.nothing


def test_images_are_loaded_and_saved(tmp_path: Path) -> None:
    import torch

    image = torch.arange(3 * 20 * 30).reshape(3, 20, 30).remainder(256) / 127.5 - 1
    for name in ("a.png", "b.PNG"):
        softvq.save_image(image, tmp_path / name)
        torch.testing.assert_close(softvq.load_image(tmp_path / name), image, rtol=0, atol=1e-6)
    softvq.save_image(image * 9, tmp_path / "a.png")  # clamped
    assert softvq.load_image((tmp_path / "a.png").read_bytes()).abs().max() == 1
    assert softvq.load_image(tmp_path / "a.png", size=16).shape == (3, 16, 16)
    with pytest.raises(softvq.InputError, match=r"a.tiff: expected a name that ends in \.jpg"):
        softvq.save_image(image, tmp_path / "a.tiff")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.PNG"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_offer(path: Path) -> None:
    tree = tree_of(path)
    if path.name == "__init__.py" and not tree.body[1:]:
        return  # a room of the package needs no more than its sentence
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and any(getattr(t, "id", "") == "__all__" for t in getattr(node, "targets", [getattr(node, "target", None)]))
        and node.value is not None
    ]
    assert len(listed) == 1, f"{name_of(path)} has no __all__"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in listed[0]:
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"
            methods = node.body if isinstance(node, ast.ClassDef) else []
            for method in methods:
                if public(method) and method.name not in {"forward"}:  # forward is what the class says
                    assert ast.get_docstring(method), f"{name_of(path)}: {node.name}.{method.name} has no docstring"


@pytest.mark.parametrize("path", [*MODULES, *OTHERS], ids=name_of)
def test_sizes(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{name_of(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_in_the_package_runs_code_from_data_or_prints(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in {"print", "eval", "exec", "compile", "__import__"}, where
            assert getattr(node.func, "attr", "") not in {"cuda", "unsafe_load"}, where
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        roots = {name.partition(".")[0] for name in imported}
        assert not roots & {"dill", "joblib", "marshal", "shelve", "stlpips_pytorch"}, where
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle":
            assert node.attr.endswith("Error"), where  # torch raises pickle's errors
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), where


def test_torch_load_never_unpickles() -> None:
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{name_of(path)}:{node.lineno}"


def test_nothing_is_left_lying_about() -> None:
    patterns = {
        "a path of one machine": r"(?:^|[\s\"'`(=])/(?:root|home|Users|tmp|work|mnt)/[A-Za-z]",
        "an unfinished thought": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
        "a silenced type error": r"#\s*(?:type|pyrefly):\s*i" + "gnore",
        "a merge conflict": r"^(?:<{7}|>{7}) ",
    }
    found = [
        f"{name_of(path)}:{number}: {what}"
        for path in tracked_files()
        if path.suffix in TEXT_SUFFIXES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for what, pattern in patterns.items()
        if re.search(pattern, line)
    ]
    assert not found


def test_pickles_and_large_files_are_not_kept() -> None:
    for path in tracked_files():
        assert path.suffix not in {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
        is_bundled = path.match("softvq/pretrained/*/model.safetensors")
        assert path.stat().st_size < (30e6 if is_bundled else 1 << 20)


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == softvq.__version__ == citation["version"]
    assert project["license"] == citation["license"]
    assert f"## [{softvq.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_documents_hold_together(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for snippet in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        tree = ast.parse(snippet)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softvq"):
                module = __import__(node.module or "", fromlist=["_"])
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name_of(path)}: {node.module} has no {alias.name}"
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link and not link.startswith("mailto:"):
            assert (path.parent / link).exists(), f"{name_of(path)}: {link} leads nowhere"


def test_documented_commands_exist() -> None:
    from softvq.cli import main

    for path in documents():
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        listed = [
            *re.findall(r"^softvq ([a-z-]+)", "".join(blocks), re.MULTILINE),
            *re.findall(r"`softvq ([a-z-]+)", text),
        ]
        for command in sorted(set(listed) - {"--help"}):
            assert main([command, "--help"]) == 0, f"{name_of(path)}: softvq {command}"


def test_documented_launches_reach_softvq() -> None:
    from torch.distributed.run import parse_args

    texts = [path.read_text(encoding="utf-8") for path in (*documents(), *(ROOT / "configs").rglob("*.yaml"))]
    launches = {line for text in texts for line in re.findall(r"^(?:# +)?torchrun (.+)$", text, re.MULTILINE)}
    assert launches
    for launch in launches:  # torchrun takes `--run` for one of its own, unless `--` ends those
        choices = parse_args(launch.split())
        assert choices.module
        assert [choices.training_script, choices.training_script_args[0]] == ["softvq", "train"]


def recipes() -> list[object]:
    found = [pytest.param(path.read_text(), id=name_of(path)) for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    for path in documents():
        blocks = re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        found += [pytest.param(block, id=f"{name_of(path)}-{i}") for i, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize("text", recipes())
def test_recipes_are_complete(text: str, tmp_path: Path) -> None:
    from softvq.config import from_dict, read_yaml, to_dict, to_yaml
    from softvq.training.generator_recipe import GeneratorRunConfig, expand_generator
    from softvq.training.tokenizer_recipe import TokenizerRunConfig, expand_preset

    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    data = read_yaml(path)
    if str(data["model"].get("preset", "")).startswith(("sit-", "dit-", "mar-")):
        kind, data = GeneratorRunConfig, expand_generator(data, {"num_tokens": 64, "latent_dim": 32, "num_classes": 5})
    else:
        kind, data = TokenizerRunConfig, expand_preset(data)
    config = from_dict(kind, data, "recipe")
    path.write_text(to_yaml(config))
    assert from_dict(kind, read_yaml(path)) == config
    assert to_dict(config)["data"]["path"] is None  # a recipe names no folder of ours
