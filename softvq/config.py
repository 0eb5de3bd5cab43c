"""Frozen dataclasses from and to YAML and JSON, strictly: a config is checked once, here, and can never name code.

A field may be a nested dataclass, a union of dataclasses told apart by their `kind`, a `Literal`, `bool`, `int`,
`float`, `str`, `tuple[...]`, or any of these `| None`. Everything else is a mistake of ours, found by `from_dict`.
"""

import copy
import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from softvq.errors import InputError

__all__ = [
    "apply_overrides",
    "check_finite",
    "flat",
    "from_dict",
    "merged",
    "read_json",
    "read_yaml",
    "to_dict",
    "to_yaml",
]

T = TypeVar("T")
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 16
MAX_YAML_NODES = 10_000
"""Names and values in a YAML file; parsing takes about 40 microseconds for each."""


def from_dict(cls: type[T], data: Any, where: str = "config") -> T:
    """Build the dataclass `cls` from plain data.

    Args:
        cls: A dataclass whose fields are all annotated.
        data: Nested dictionaries, lists and scalars, as YAML or JSON give them.
        where: What to call the data in errors, usually the file's path.

    Returns:
        The checked config.

    Raises:
        InputError: If a key is unknown or missing, a value has the wrong type, or a combination is impossible; the
            message names the dotted field, the value and what would be right.
    """
    return _build(cls, data, where, "")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested dictionaries, lists and scalars; `from_dict` of it gives the same config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested groups as one, by dotted names.

    >>> flat({"train": {"steps": 10}, "seed": 1})
    {'train.steps': 10, 'seed': 1}
    """
    found: dict[str, Any] = {}
    for name, value in data.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return found


def to_yaml(config: Any) -> str:
    """Return a dataclass, or nested dictionaries, as YAML text, fields in their order of definition."""
    data = config if isinstance(config, dict) else to_dict(config)
    return yaml.dump(data, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML file of plain data.

    Args:
        path: UTF-8 text of at most 1 MiB and 10,000 names and values, without tags, anchors or duplicate keys. An empty
            file is an empty config.

    Returns:
        The fields at the top level.

    Raises:
        InputError: If the file is missing, too large, or not such YAML.
    """
    text = _read(path)
    try:
        data = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise InputError(f"{path}: not plain YAML ({' '.join(str(error).split())})") from error
    return _mapping(data if data is not None else {}, path)


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: UTF-8 text of at most 1 MiB, without duplicate keys, NaN or infinities.

    Returns:
        The fields at the top level.

    Raises:
        InputError: If the file is missing, too large, or not such JSON.
    """
    text = _read(path)
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not plain JSON ({error})") from error
    if not _is_shallow(data, MAX_CONFIG_DEPTH):
        raise InputError(f"{path}: not plain JSON (nested too deeply)")
    return _mapping(data, path)


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `data` with `dotted.key=value` pairs applied; values are read as YAML scalars.

    >>> apply_overrides({"train": {"steps": 10}}, ["train.steps=20", "seed=1"])
    {'train': {'steps': 20}, 'seed': 1}

    Args:
        data: Nested dictionaries as `read_yaml` gives them; not changed.
        overrides: Pairs in order; a later one wins. Groups that do not exist yet are made.

    Returns:
        A copy of `data` with the pairs applied.

    Raises:
        InputError: If a pair has no `=`, or walks through something that is not a mapping.
    """
    result = copy.deepcopy(dict(data))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise InputError(f"override {override!r}: expected KEY=VALUE, for example train.steps=1000")
        *parents, last = dotted.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"override {override!r}: {parent} is a value, not a group of fields")
        try:
            node[last] = yaml.load(text, Loader=_PlainLoader)
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"override {override!r}: {text!r} is not a YAML value") from error
    return result


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested groups with some fields changed; a group of another `kind` replaces the whole group.

    >>> merged({"optim": {"lr": 1, "steps": 2}}, {"optim": {"lr": 3}})
    {'optim': {'lr': 3, 'steps': 2}}

    Args:
        base: Plain data.
        changes: What is different.

    Returns:
        New plain data.
    """
    result = dict(base)
    for name, value in changes.items():
        group = result.get(name)
        if isinstance(value, dict) and isinstance(group, dict):
            same_kind = value.get("kind", group.get("kind")) == group.get("kind")
            value = merged(group, value) if same_kind else value
        result[name] = value
    return result


def check_finite(config: Any) -> None:
    """Refuse a config with a number that is infinite or none at all, which a lower bound alone would let pass.

    Files cannot hold one; code can.

    Args:
        config: A dataclass; what it holds in groups of its own is not looked at.

    Raises:
        InputError: With the name of the field.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{field.name} is {value}, expected a finite number")


def _build(expected: Any, value: Any, where: str, field: str) -> Any:
    origin = typing.get_origin(expected)
    if dataclasses.is_dataclass(expected):
        return _build_dataclass(expected, value, where, field)
    if origin in (typing.Union, types.UnionType):
        return _build_union(typing.get_args(expected), value, where, field)
    if origin is Literal:
        choices = typing.get_args(expected)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise _wrong(where, field, value, "one of " + ", ".join(map(repr, choices)), choices)
        return value
    if origin is tuple:
        return _build_tuple(typing.get_args(expected), value, where, field)
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    if expected is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not expected or (expected is float and not math.isfinite(value)):
        raise _wrong(where, field, value, names[expected])
    return value


def _build_dataclass(cls: Any, value: Any, where: str, field: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise _wrong(where, field, value, f"a group of fields ({cls.__name__})")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in value:
        if key not in names:
            raise InputError(f"{where}: unknown field {_join(field, key)!r}{_suggest(key, names)}")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise InputError(f"{where}: field {_join(field, f.name)!r} is missing")
    built = {key: _build(hints[key], item, where, _join(field, key)) for key, item in value.items()}
    try:
        return cls(**built)
    except InputError as error:
        raise InputError(f"{where}: {field + ': ' if field else ''}{error}") from error


def _build_union(members: tuple[Any, ...], value: Any, where: str, field: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _build(members[0], value, where, field)
    if all(dataclasses.is_dataclass(member) for member in members):
        if isinstance(value, members):
            return value
        kinds = {typing.get_args(typing.get_type_hints(member)["kind"])[0]: member for member in members}
        if not isinstance(value, dict) or "kind" not in value:
            raise _wrong(where, field, value, "a group of fields with a 'kind' of " + ", ".join(map(repr, kinds)))
        if not isinstance(value["kind"], str) or value["kind"] not in kinds:
            raise _wrong(where, _join(field, "kind"), value["kind"], "one of " + ", ".join(map(repr, kinds)), kinds)
        return _build_dataclass(kinds[value["kind"]], value, where, field)
    for member in members:
        try:
            return _build(member, value, where, field)
        except InputError:
            continue
    raise _wrong(where, field, value, " or ".join(getattr(member, "__name__", str(member)) for member in members))


def _build_tuple(members: tuple[Any, ...], value: Any, where: str, field: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, field, value, "a list")
    if members[-1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise _wrong(where, field, value, f"a list of {len(members)}")
    pairs = enumerate(zip(members, value, strict=True))
    return tuple(_build(member, item, where, f"{field}[{i}]") for i, (member, item) in pairs)


def _wrong(where: str, field: str, value: Any, expected: str, choices: Iterable[Any] = ()) -> InputError:
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return InputError(f"{where}: {field or 'the top level'} is {text}, expected {expected}{_suggest(value, choices)}")


def _suggest(value: Any, choices: Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _join(field: str, key: Any) -> str:
    return f"{field}.{key}" if field else str(key)


def _read(path: Path | str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise InputError(f"{path}: larger than 1 MiB, which no config is")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _mapping(data: Any, path: Path | str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {type(data).__name__}, expected named fields")
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _is_shallow(data: Any, levels: int) -> bool:
    if not isinstance(data, dict | list):
        return True
    items = data.values() if isinstance(data, dict) else data
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in items)


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags, anchors or duplicate keys."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.depth = 0
        self.nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError("anchors and aliases are not allowed")
        if getattr(event, "tag", None):
            raise yaml.YAMLError(f"the tag {event.tag} is not allowed")
        if self.depth > MAX_CONFIG_DEPTH:
            raise yaml.YAMLError("nested too deeply")
        self.nodes += 1
        if self.nodes > MAX_YAML_NODES:
            raise yaml.YAMLError(f"more than {MAX_YAML_NODES:,} names and values")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} is not text")
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _PlainDumper(yaml.SafeDumper):
    """Quotes text that `_PlainLoader` or any other YAML reader would take for something else."""


# YAML 1.2's idea of plain scalars: `1e-4` is a number, while `010`, `1:30`, `no`, `.nan` and `2026-01-01` are text.
_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+|[0-9]+\.[0-9]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?)\Z")
_PlainLoader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _first)
_PlainDumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
