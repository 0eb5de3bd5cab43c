"""Configs: every way to get one wrong is one sentence, and what is written is what is read."""

import contextlib
import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from softvq.config import apply_overrides, from_dict, read_json, read_yaml, to_dict, to_yaml
from softvq.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Soft:
    kind: Literal["soft"] = "soft"
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"temperature is {self.temperature}, expected more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hard:
    kind: Literal["hard"] = "hard"
    codes: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    width: int
    name: str = "tiny"
    flip: bool = True
    rate: float = 1e-4
    limit: int | None = None
    crop: Literal["random", "center"] = "random"
    betas: tuple[float, float] = (0.9, 0.95)
    sizes: tuple[int, ...] = ()
    seed: int | str = 0
    quantizer: Soft | Hard = field(default_factory=Soft)
    teacher: Hard | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    model: Model
    steps: int = 10


def build(**fields: object) -> Run:
    return from_dict(Run, {"model": {"width": 4, **fields}}, "run.yaml")


def test_defaults_and_nesting() -> None:
    run = build(quantizer={"kind": "hard", "codes": 3}, betas=[0.5, 1], teacher={"kind": "hard"}, sizes=[1, 2, 3])
    assert run.model == Model(
        width=4, quantizer=Hard(codes=3), betas=(0.5, 1.0), teacher=Hard(), sizes=(1, 2, 3)
    )  # frozen dataclasses compare by value and type
    assert type(run.model.betas[1]) is float
    assert build(seed="a").model.seed == "a"
    assert build(limit=None).model.limit is None


def test_configs_that_are_built_already_pass_through() -> None:
    model = Model(width=1, quantizer=Hard())
    assert from_dict(Run, {"model": model}).model is model
    assert build(quantizer=Hard(codes=2)).model.quantizer == Hard(codes=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widht": 1}, "unknown field 'model.widht'; did you mean 'width'?"),
        ({"zzz": 1}, "unknown field 'model.zzz'"),
        ({"width": "4"}, "model.width is '4', expected a whole number"),
        ({"width": 4.0}, "model.width is 4.0, expected a whole number"),
        ({"width": True}, "model.width is True, expected a whole number"),
        ({"width": None}, "model.width is None, expected a whole number"),
        ({"flip": 1}, "model.flip is 1, expected true or false"),
        ({"flip": "yes"}, "model.flip is 'yes', expected true or false"),
        ({"name": 3}, "model.name is 3, expected text"),
        ({"rate": True}, "model.rate is True, expected a finite number"),
        ({"rate": "fast"}, "model.rate is 'fast', expected a finite number"),
        ({"rate": math.nan}, "model.rate is nan, expected a finite number"),
        ({"rate": math.inf}, "model.rate is inf, expected a finite number"),
        ({"rate": 10**400}, "model.rate is 1000"),
        ({"limit": "none"}, "model.limit is 'none', expected a whole number"),
        ({"crop": "centre"}, "model.crop is 'centre', expected one of 'random', 'center'; did you mean 'center'?"),
        ({"crop": ["center"]}, "model.crop is ['center'], expected one of"),
        ({"betas": 0.9}, "model.betas is 0.9, expected a list"),
        ({"betas": [0.9]}, "model.betas is [0.9], expected a list of 2"),
        ({"betas": [0.9, "x"]}, "model.betas[1] is 'x', expected a finite number"),
        ({"sizes": [1, 2.5]}, "model.sizes[1] is 2.5, expected a whole number"),
        ({"seed": 1.5}, "model.seed is 1.5, expected int or str"),
        (
            {"quantizer": "soft"},
            "model.quantizer is 'soft', expected a group of fields with a 'kind' of 'soft', 'hard'",
        ),
        ({"quantizer": {"codes": 3}}, "expected a group of fields with a 'kind' of 'soft', 'hard'"),
        (
            {"quantizer": {"kind": "sotf"}},
            "model.quantizer.kind is 'sotf', expected one of 'soft', 'hard'; did you mean",
        ),
        ({"quantizer": {"kind": ["soft"]}}, "model.quantizer.kind is ['soft'], expected one of"),
        ({"quantizer": {"kind": "soft", "codes": 3}}, "unknown field 'model.quantizer.codes'"),
        (
            {"quantizer": {"kind": "soft", "temperature": 0}},
            "model.quantizer: temperature is 0.0, expected more than 0",
        ),
        ({"teacher": 3}, "model.teacher is 3, expected a group of fields (Hard)"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        build(**fields)
    assert str(error.value).startswith("run.yaml: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_top_levels_are_named() -> None:
    with pytest.raises(InputError, match=r"run.yaml: field 'model' is missing"):
        from_dict(Run, {}, "run.yaml")
    with pytest.raises(InputError, match=r"run.yaml: field 'model.width' is missing"):
        from_dict(Run, {"model": {}}, "run.yaml")
    with pytest.raises(InputError, match=r"run.yaml: the top level is \[\], expected a group of fields \(Run\)"):
        from_dict(Run, [], "run.yaml")


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(InputError, match=r"\.\.\.") as error:
        build(width="x" * 10_000)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2", "the key 'a' stands twice"),
        ("model: {b: 1, b: 2}", "the key 'b' stands twice"),
        ("a: &x [1]\nb: *x", "anchors and aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "anchors and aliases"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [true]", "the tag"),
        ("a: !!python/name:os.system", "the tag"),
        ("a: !!int '3'", "the tag"),
        ("a: !mine 3", "the tag"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ("\n".join("  " * i + "a:" for i in range(100)), "nested too deeply"),
        ("1: a", "the key 1 is not text"),
        ("? [a]\n: b", "is not text"),
        ("a: [1", "expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \x00", "special characters are not allowed"),
        ("a: " + "9" * 5000, "digits"),
        ("- 1", "holds list, expected named fields"),
        ("text", "holds str, expected named fields"),
    ],
)
def test_yaml_that_is_not_plain_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tag_runs_nothing(tmp_path: Path) -> None:
    path, witness = tmp_path / "run.yaml", tmp_path / "witness"
    path.write_text(f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{witness}]]")
    with pytest.raises(InputError):
        read_yaml(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "a key stands twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1', "not plain JSON"),
        ("", "not plain JSON"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
        ("[" * 100_000, "not plain JSON"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("[1]", "holds list, expected named fields"),
        ("null", "holds NoneType, expected named fields"),
    ],
)
def test_json_that_is_not_plain_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_files_that_cannot_be_read(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with pytest.raises(InputError, match=r"missing.yaml: cannot be read \(No such file or directory\)"):
        read(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(b"a: \xff")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read(path)
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(InputError, match="larger than 1 MiB"):
        read(path)
    with pytest.raises(InputError, match="larger than 1 MiB"):
        read("/dev/zero")  # its size is said to be 0


def test_files_of_the_greatest_size_and_depth_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b'{"a": 1}'.ljust(1 << 20))
    assert read_yaml(path) == read_json(path) == {"a": 1}
    path.write_text('{"a": ' + "[" * 15 + "]" * 15 + "}")
    assert read_yaml(path) == read_json(path)


def test_an_empty_yaml_file_is_an_empty_config(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        ("-2", -2),
        ("1_000", 1000),
        ("1.", 1.0),
        (".5", 0.5),
        ("true", True),
        ("", None),
        ("~", None),
        ("010", "010"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("2026-01-01", "2026-01-01"),
        (".nan", ".nan"),
        ("0x10", "0x10"),
        ("'1'", "1"),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"a: {text}\n")
    result = read_yaml(path)["a"]
    assert result == value
    assert type(result) is type(value)


def test_overrides() -> None:
    data = {"train": {"steps": 10}, "seed": 0}
    result = apply_overrides(data, ["train.steps=20", "train.rate=1e-4", "new.deep.key=[1, a]", "seed=", "name=a=b"])
    assert result == {
        "train": {"steps": 20, "rate": 1e-4},
        "new": {"deep": {"key": [1, "a"]}},
        "seed": None,
        "name": "a=b",
    }
    assert data == {"train": {"steps": 10}, "seed": 0}
    assert apply_overrides({}, ["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("seed.deep=3", "seed is a value, not a group of fields"),
        ("seed=[1", "is not a YAML value"),
        ("seed=!!python/name:os.system", "is not a YAML value"),
        ("seed=" + "9" * 5000, "is not a YAML value"),
        ("seed=" + "[" * 5000, "is not a YAML value"),
    ],
)
def test_wrong_overrides(override: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        apply_overrides({"seed": 0}, [override])


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        ["1e-4", "no", "null", "010", "1:30", "true", "~", "", "2026-01-01", "<<", "a: b", "!x", "&y", "0x1"]
    ),
)
runs = st.builds(
    Run,
    steps=st.integers(),
    model=st.builds(
        Model,
        width=st.integers(),
        name=texts,
        flip=st.booleans(),
        rate=finite,
        limit=st.none() | st.integers(),
        crop=st.sampled_from(["random", "center"]),
        betas=st.tuples(finite, finite),
        sizes=st.lists(st.integers(), max_size=4).map(tuple),
        seed=st.integers() | texts,
        quantizer=st.builds(Soft, kind=st.just("soft"), temperature=st.floats(1e-6, 1e6))
        | st.builds(Hard, kind=st.just("hard")),
        teacher=st.none() | st.builds(Hard, kind=st.just("hard")),
    ),
)


@given(run=runs)
def test_what_is_written_is_what_is_read(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("round_trip")
    (folder / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(to_dict(run)), encoding="utf-8")
    assert from_dict(Run, read_yaml(folder / "run.yaml")) == run
    assert from_dict(Run, read_json(folder / "run.json")) == run


@given(run=runs)
def test_other_yaml_readers_read_the_same_text(run: Run) -> None:
    model = yaml.safe_load(to_yaml(run))["model"]
    assert (model["name"], model["seed"]) == (run.model.name, run.model.seed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@given(data=st.fixed_dictionaries({}, optional={"steps": json_values, "model": json_values}) | json_values)
def test_any_data_builds_or_is_an_input_error(data: object) -> None:
    try:
        run = from_dict(Run, data)
    except InputError:
        return
    assert isinstance(run, Run)


@given(text=st.text(max_size=60))
def test_any_text_reads_or_is_an_input_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    for read in (read_yaml, read_json):
        with contextlib.suppress(InputError):  # anything else is a traceback for the user
            assert isinstance(read(path), dict)


def configs_in(kind: Any, found: dict[type, None]) -> dict[type, None]:
    """Collect the dataclasses that a recipe may hold."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in found:
        found[kind] = None
        for hint in typing.get_type_hints(kind).values():
            configs_in(hint, found)
    for part in typing.get_args(kind):
        configs_in(part, found)
    return found


def test_no_number_of_any_config_is_infinite_or_none_at_all() -> None:
    from softvq.training.generator_recipe import GeneratorRunConfig
    from softvq.training.tokenizer_recipe import TokenizerRunConfig

    count = 0
    for kind in configs_in(GeneratorRunConfig, configs_in(TokenizerRunConfig, {})):
        needed = {f.name: 8 for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
        for name, hint in typing.get_type_hints(kind).items():
            if hint not in (float, float | None, tuple[float, ...], tuple[float, float]):
                assert "float" not in str(hint), f"{kind.__name__}.{name} is not looked at"
                continue
            for value in (math.inf, -math.inf, math.nan):
                given = value if hint in (float, float | None) else (value, value)
                with pytest.raises(InputError, match=name):
                    kind(**{**needed, name: given})
                count += 1
    assert count > 100
