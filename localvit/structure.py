"""Turn JSON and YAML into typed dataclasses and back: the only place that does it.

`build` makes a value of a type from plain mappings, lists and scalars; `plain` is its inverse. Types are
strict, with two exceptions that files need: an integer or a text such as `1e-3` (a text in YAML 1.1) is
accepted for a float, and a list for a tuple. Unknown fields, NaN and infinity are refused at every depth.

A dataclass with methods `from_dict` and `to_dict` of its own (`LocalityConfig`) reads and writes itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from localvit.errors import ConfigError, one_line

T = TypeVar("T")
MOST_DEPTH = 40
"""Levels of nesting."""
MOST_VALUES = 20_000
"""Values in a YAML file, counted wherever an alias repeats them."""
MOST_CHARACTERS = 2**20
"""Length of a YAML text."""
MOST_BYTES = 64 * 2**20
"""Size of a file."""

_YAML = "tag:yaml.org,2002:"
_CHOICE = "\0"
"""Mark in pydantic's paths of the union member that refused a value."""
_WORDS = {
    "a valid dictionary": "a mapping of field to value",
    "a dictionary": "a mapping of field to value",
    "a valid boolean": "true or false",
    "a valid tuple": "a list",
    "a valid integer": "an integer",
    "a valid ": "a ",
}
"""pydantic's words -> ours."""


def plain(value: Any, where: str = "", depth: int = 0) -> Any:
    """Return `value` as mappings, lists and scalars that JSON can hold; the inverse of `build`.

    Args:
        value: A dataclass, or anything made of them, mappings, lists, tuples and scalars.
        where: Its place in the whole, for the message.
        depth: Its nesting level.

    Raises:
        ConfigError: for NaN, infinity, an integer of more than 64 bits, or a type that JSON does not have.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "to_dict", None)
        value = own() if own else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if depth > MOST_DEPTH:
        raise ConfigError(f"{where[:80]}...: too deeply nested; use at most {MOST_DEPTH} levels")
    if isinstance(value, Mapping):
        if wrong := [key for key in value if isinstance(key, bool) or not isinstance(key, (str, int))]:
            raise ConfigError(f"{join(where, str(wrong[0]))}: the key {wrong[0]!r} is not text; quote it")
        # An integer (a seed) becomes text, as in `json`.
        return {str(key): plain(item, join(where, str(key)), depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, join(where, i), depth + 1) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where or 'value'}: {value} is not accepted; use a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ConfigError(f"{where or 'value'}: an integer of {value.bit_length()} bits; use at most 64")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ConfigError(f"{where or 'value'}: {_shown(value)} is not a JSON value; quote it if it is text")


def build(kind: type[T], values: Any, where: str = "") -> T:
    """Make a `kind` (a dataclass, `dict[str, Job]`, ...) from mappings, lists and scalars.

    Args:
        kind: The type.
        values: What `plain` returns, or a part of it; missing fields have their defaults.
        where: The place of `values` in the whole, for the message.

    Raises:
        ConfigError: with the dotted path of the first wrong field, its value and what is accepted.
    """
    from pydantic import ValidationError

    try:
        return typing.cast(T, _validator(typing.cast(Any, kind)).validate_python(plain(values, where)))
    except ValidationError as error:
        raise _refusal(kind, error.errors(include_url=False), where) from error


def schema(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type."""
    return dict(_adapter(kind).json_schema())


def to_json(value: Any, indent: int | None = 1) -> str:
    """Return `plain(value)` as JSON, with a line feed at the end where it has several lines."""
    text = json.dumps(plain(value), indent=indent, allow_nan=False)
    return text if indent is None else f"{text}\n"


def to_yaml(value: Any) -> str:
    """Return `plain(value)` as YAML, with fields in their order."""
    values = plain(value)
    # PyYAML loses these characters in keys, unless all that is not ASCII is escaped.
    wide = not set("\x85\u2028\u2029\ufeff") & set(json.dumps(values, ensure_ascii=False))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=wide, width=100)


def parse_json(text: str, name: str = "the text") -> Any:
    """Parse a JSON text.

    Raises:
        ConfigError: if it is not JSON, has a duplicate key, or has NaN or infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {one_line(error)}") from error


def read_json(kind: type[T], path: str | Path) -> T:
    """Read a `kind` from a JSON file.

    Raises:
        ConfigError: naming the file, and the field as `build` does.
    """
    values = parse_json(_read(path), repr(str(path)))
    try:
        return build(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error


def parse_yaml(text: str, name: str = "the text") -> Any:
    """Parse a YAML text.

    Raises:
        ConfigError: with line and field, if it is not YAML, has a duplicate key or one that is not text, is
            nested too deeply, too large (aliases included), or has a value that JSON does not have.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{name} is too long; use at most {MOST_CHARACTERS} characters of YAML")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.value(node, "", 0)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = "" if type(error) is yaml.MarkedYAMLError else "not YAML: "  # ours, or PyYAML's
        raise ConfigError(f"{name}{line}: {what}{' '.join((problem or str(error)).split())}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: as `parse_yaml`, or if it cannot be read or is not a mapping.
    """
    values = parse_yaml(_read(path), repr(str(path)))
    if not isinstance(values, dict):
        raise ConfigError(f"{str(path)!r}: {_shown(values)} is not accepted; use a mapping of field to value")
    return values


def join(where: str, part: str | int) -> str:
    """Return the dotted path of a field or item."""
    if isinstance(part, int):
        return f"{where}[{part}]"
    name = part if part.isprintable() and len(part) <= 100 else _shown(part)
    return f"{where}.{name}" if where else name


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _read(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{str(path)!r} cannot be read: {reason}; check path and permissions") from error
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{str(path)!r} is too large; use at most {MOST_BYTES >> 20} MB")
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with bounded depth and number of values, and with text keys only."""

    depth = 0
    composed = 0
    values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1  # composing is recursive, so its depth is bounded as well
        self.composed += 1
        if self.depth > MOST_DEPTH + 1 or self.composed > 2 * MOST_VALUES:
            self._refuse_size(self.peek_event(), self.depth)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse_size(self, node: Any, depth: int) -> None:
        deep = f"too deeply nested; use at most {MOST_DEPTH} levels"
        many = f"too many values; use at most {MOST_VALUES}, with aliases"
        raise _problem(node, "", deep if depth > MOST_DEPTH else many)

    def value(self, node: yaml.Node, path: str, depth: int) -> Any:
        self.values += 1
        if self.values > MOST_VALUES or depth > MOST_DEPTH:
            self._refuse_size(node, depth)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_YAML}map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_YAML}seq":
            return [self.value(item, join(path, i), depth + 1) for i, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            if key.tag == f"{_YAML}merge":  # `<<: *base`
                found = self.value(item, path, depth + 1)
                for base in reversed(found if isinstance(found, list) else [found]):
                    if not isinstance(base, dict):
                        raise _problem(item, path, "<< without a mapping; merge a mapping")
                    merged |= base
                continue
            if key.tag != f"{_YAML}str":
                name = key.value if isinstance(key, yaml.ScalarNode) else "..."
                raise _problem(key, path, f"the key {name} is not text in YAML; quote it: '{name}'")
            if key.value in values:
                raise _problem(key, path, f"duplicate key {key.value!r}; remove one")
            values[key.value] = self.value(item, join(path, key.value), depth + 1)
        return merged | values

    def _scalar(self, node: yaml.Node, path: str) -> Any:
        kind = node.tag.removeprefix(_YAML)
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "int", "float", "bool", "null"):
            try:
                return self.construct_object(node)
            except (ValueError, OverflowError, LookupError):
                pass  # `0x_`, or an integer of too many digits
        words = {"timestamp": "a date", "int": "an integer", "float": "a number"}.get(kind, node.tag)
        shown = node.value[:80] if isinstance(node, yaml.ScalarNode) else "this"
        raise _problem(
            node, path, f"{shown} is {words} in YAML, which is not accepted; quote it if it is text"
        )


def _problem(node: Any, path: str, text: str) -> yaml.MarkedYAMLError:
    whole = f"{path}: {text}" if path else text
    return yaml.MarkedYAMLError(None, None, whole, node.start_mark)


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # pydantic ignores this configuration for a dataclass, but not for a NewType of it.
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return TypeAdapter(typing.NewType("Values", kind), config=config)  # type: ignore[arg-type]


@functools.cache
def _validator(kind: Any) -> Any:
    from pydantic_core import SchemaValidator

    core = _adapter(kind).core_schema
    return SchemaValidator(_lenient(core), {"strict": True, "allow_inf_nan": False})


def _lenient(core: Any) -> Any:
    """Return pydantic's schema with the exceptions that files need."""
    from pydantic_core import core_schema

    if isinstance(core, list):
        return [_lenient(one) for one in core]
    if not isinstance(core, dict):
        return core
    kind, owner = core.get("type"), typing.cast(Any, core.get("cls"))
    if kind == "dataclass" and hasattr(owner, "from_dict"):
        return core_schema.no_info_plain_validator_function(owner.from_dict, ref=core.get("ref"))
    data = ("config", "default", "expected", "metadata", "serialization")
    made = {name: value if name in data else _lenient(value) for name, value in core.items()}
    if kind in ("dataclass", "tuple"):
        made["strict"] = False  # they come as mapping and list
    elif kind == "float":
        return core_schema.no_info_before_validator_function(_number, made)
    elif kind == "union":  # no name of the choice in the path of an error
        made["choices"] = [(one[0] if isinstance(one, tuple) else one, _CHOICE) for one in made["choices"]]
    return made


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _refusal(kind: Any, problems: Sequence[Any], where: str) -> ConfigError:
    """Return the error for the first problem, or for the first unknown field, which may explain it."""
    problem = min(problems, key=lambda one: one["type"] != "unexpected_keyword_argument")
    places = [tuple(part for part in one["loc"] if part != _CHOICE) for one in problems]
    place = places[problems.index(problem)]
    local = functools.reduce(join, place, "")
    path = f"{where}.{local}" if where and local else where or local
    if problem["type"] == "value_error":  # raised by the dataclass, which may name the field itself
        text = str(problem["ctx"]["error"])
        before = where if text.startswith((f"{local}.", f"{local}=", f"{local}:")) else path
        return ConfigError(f"{before}: {text}" if before else text)
    if problem["type"] == "unexpected_keyword_argument":
        suggestion = _suggestion(kind, place, problem["loc"][-1])
        return ConfigError(f"{path or repr(problem['loc'][-1])}: this field does not exist; {suggestion}")
    if problem["type"] == "missing":
        return ConfigError(f"{path} is missing; add it")
    accepted = [_accepted(one["msg"]) for one, other in zip(problems, places, strict=True) if other == place]
    shown = _shown(problem["input"])
    return ConfigError(
        f"{path or 'value'}: {shown} is not accepted; use {' or '.join(dict.fromkeys(accepted))}"
    )


def _accepted(message: str) -> str:
    text = message.removeprefix("Input should be ").partition(" or an instance of ")[0]
    text = text.replace("Tuple should have at ", "a list of at ").partition(" after validation")[0]
    return functools.reduce(lambda found, pair: found.replace(*pair), _WORDS.items(), text)


def _choices(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _at(kind: Any, place: Sequence[str | int]) -> Any:
    """Return the type of a field or item."""
    for part in place:
        for choice in _choices(kind):
            if dataclasses.is_dataclass(choice):
                kind = typing.get_type_hints(choice)[str(part)]
                break
            elif typing.get_origin(choice) in (dict, list, tuple):
                kind = typing.get_args(choice)[1 if isinstance(part, str) else 0]
                break
    return kind


def _suggestion(kind: Any, place: Sequence[Any], name: str) -> str:
    """Suggest the field that was probably meant, or else list the existing ones."""
    where, paths = functools.reduce(join, place[:-1], ""), _paths(_at(kind, place[:-1]))
    fields = [path for path in paths if "." not in path]
    tails = {path.rpartition(".")[2]: path for path in sorted(paths, key=lambda path: -path.count("."))}
    near = [name] if name in tails else difflib.get_close_matches(name, fields, 1)
    near = near or difflib.get_close_matches(name, tails, 1, 0.7)
    return f"did you mean {join(where, tails[near[0]])!r}?" if near else f"accepted: {', '.join(fields)}"


def _paths(kind: Any) -> list[str]:
    """Return the dotted names of fields and of their fields."""
    found: list[str] = []
    for owner in _choices(kind):
        if dataclasses.is_dataclass(owner):
            for name, hint in typing.get_type_hints(owner).items():
                found += [name, *(f"{name}.{below}" for below in _paths(hint))]
    return found
