"""Configurations as plain mappings and YAML: recipe, then `key=value` settings, then explicit values."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from localvit.config.schema import TrainConfig
from localvit.data import DataError
from localvit.errors import ConfigError, unknown
from localvit.locality import LocalityConfig, preset

T = TypeVar("T")
_FILES = (".yaml", ".yml")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested mappings, lists and scalars; the inverse of `from_dict`."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: _plain(value) for name, value in values.items()}


def from_dict(values: Mapping[str, Any], kind: type[T] = TrainConfig, path: str = "") -> T:  # type: ignore[assignment]
    """Build a configuration from nested mappings; what is missing has its default.

    Args:
        values: Field -> value.
        kind: The dataclass to build.
        path: Where `values` stands in the whole, for error messages.

    Raises:
        ConfigError: for an unknown key (with the nearest name), a value of the wrong type, or values that
            cannot be combined; the message has the full dotted path.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the configuration'}: {values!r} is not a mapping of field to value")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise unknown("configuration", _join(path, key), _all_paths(kind, path))
    for needed in dataclasses.fields(kind):  # type: ignore[arg-type]
        given = needed.name in values or needed.default is not dataclasses.MISSING
        if not given and needed.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, needed.name)} is missing")
    built = {key: _convert(value, hints[key], _join(path, key)) for key, value in values.items()}
    try:
        return kind(**built)
    except DataError as error:
        raise ConfigError(str(error)) from error


def dump(config: TrainConfig) -> str:
    """YAML that `from_dict` reads back as the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: if it cannot be read or is no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"cannot read configuration {str(path)!r}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{str(path)!r} is not a mapping of field to value")
    return values


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("localvit.config") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(recipe: str) -> dict[str, Any]:
    """The values of a recipe that comes with the package, or of a YAML file.

    A recipe may begin with ``extends: NAME|FILE``: its values then stand over those of that one, mapping
    by mapping. A file that is not absolute is looked for beside the one that names it.

    Raises:
        ConfigError: if there is no such recipe, or it extends itself.
    """
    layers: list[dict[str, Any]] = []
    chain: list[str] = []
    following: str | None = str(Path(recipe).resolve()) if recipe.endswith(_FILES) else recipe
    while following is not None:
        if following in chain:
            raise ConfigError(f"recipe {recipe!r} extends itself: {' -> '.join([*chain, following])}")
        chain.append(following)
        layers.append(_read_recipe(following))
        following = _extended(layers[-1].pop("extends", None), following)
    values: dict[str, Any] = {}
    for layer in reversed(layers):
        values = merge(values, layer)
    return values


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe.endswith(_FILES):
        return load_yaml(recipe)
    if recipe not in list_recipes():
        error = unknown("recipe", recipe, list_recipes())
        raise ConfigError(f"{error} (recipes: {', '.join(list_recipes())}; or a .yaml file)")
    with resources.as_file(resources.files("localvit.config") / "recipes" / f"{recipe}.yaml") as path:
        return load_yaml(path)


def _extended(name: Any, by: str) -> str | None:
    """What the recipe `by` extends; a file as a full path, so that a circle is seen."""
    if name is None or (isinstance(name, str) and not name.endswith(_FILES)):
        return name
    if not isinstance(name, str):
        raise ConfigError(f"recipe {by!r}: extends={name!r} is not the name of a recipe")
    return str((Path(by).parent / name).resolve())


def parse_setting(setting: str) -> dict[str, Any]:
    """``"optim.lr=1e-3"`` as ``{"optim": {"lr": "1e-3"}}``; the value is YAML.

    Raises:
        ConfigError: if there is no ``=`` or the value is no YAML.
    """
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"setting {setting!r} is not of the form key=value, e.g. optim.lr=1e-3")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"setting {setting!r}: the value is not YAML") from error
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in their places, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        # An empty mapping is a value, not "no change": `locality: {}` is locality with its defaults.
        merged[key] = merge(merged[key], value) if both and value else value
    return merged


def resolve(
    recipe: str | None = None, settings: Sequence[str] = (), explicit: Mapping[str, Any] | None = None
) -> TrainConfig:
    """A configuration from its layers; each beats the ones before it.

    Args:
        recipe: Name or YAML file.
        settings: ``key=value`` strings with dotted keys.
        explicit: Nested mapping, e.g. of command-line flags.
    """
    values: dict[str, Any] = load_recipe(recipe) if recipe else {}
    for setting in settings:
        values = merge(values, parse_setting(setting))
    return from_dict(merge(values, explicit or {}))


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _all_paths(kind: type, path: str) -> list[str]:
    found = []
    for key, hint in typing.get_type_hints(kind).items():
        found.append(_join(path, key))
        for choice in (hint, *typing.get_args(hint)):  # what may be absent is a union with None
            if dataclasses.is_dataclass(choice):
                found += _all_paths(typing.cast(type, choice), _join(path, key))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, LocalityConfig):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _locality(value: Any, path: str) -> LocalityConfig:
    """Fields of a `LocalityConfig`, over those of a published design if ``preset`` names one."""
    try:
        if isinstance(value, Mapping) and "preset" in value:
            return preset(value["preset"], **{name: v for name, v in value.items() if name != "preset"})
        return LocalityConfig.from_dict(value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type of its field."""
    if hint is Any:
        return value
    if hint is LocalityConfig:
        return _locality(value, path)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, typing.cast(type, hint), path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path}={value!r}; accepted: {', '.join(repr(a) for a in args)}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, args, path)
    if origin is tuple:
        return _convert_tuple(value, args, path)
    return _convert_scalar(value, origin or hint, path)


def _convert_union(value: Any, args: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [a for a in args if a is not type(None)]
    for choice in choices[:-1]:
        try:
            return _convert(value, choice, path)
        except ConfigError:
            continue
    return _convert(value, choices[-1], path)


def _convert_tuple(value: Any, args: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    repeated = args[-1] is Ellipsis
    if not isinstance(value, (list, tuple)) or (not repeated and len(value) != len(args)):
        count = "a list" if repeated else f"a list of {len(args)} values"
        raise ConfigError(f"{path}={value!r} is not {count}")
    return tuple(_convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))


def _convert_scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # a string, because YAML 1.1 reads 1e-3 as one
        except ValueError:
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {str: "a string", dict: "a mapping", int: "an integer", float: "a number", bool: "true or false"}
    raise ConfigError(f"{path}={value!r} is not {names.get(kind, f'a {kind.__name__}')}")
