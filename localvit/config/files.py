"""Configurations as plain mappings and YAML: recipe, then `key=value` settings, then explicit values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from localvit.config.older import from_older
from localvit.config.schema import TrainConfig
from localvit.errors import ConfigError, unknown
from localvit.structure import build, parse_yaml, read_yaml

_FILES = (".yaml", ".yml")


def read_config(path: str | Path) -> TrainConfig:
    """Read a configuration that a run wrote, of this version or 0.3.

    Raises:
        ConfigError: naming the file and the field.
    """
    values = from_older(read_yaml(path))
    try:
        return build(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error


def list_recipes() -> list[str]:
    """Return the names of the package's recipes."""
    folder = resources.files("localvit.config") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(recipe: str) -> dict[str, Any]:
    """Return the values of a recipe of the package, or of a YAML file.

    A recipe may begin with `extends: NAME|FILE`: its values then override those of that recipe, mapping by
    mapping. A relative file is relative to the file that names it.

    Raises:
        ConfigError: if the recipe does not exist or extends itself.
    """
    layers: list[dict[str, Any]] = []
    chain: list[str] = []
    following: str | None = str(Path(recipe).resolve()) if recipe.endswith(_FILES) else recipe
    while following is not None:
        if following in chain:
            raise ConfigError(
                f"recipe {recipe!r}: {' -> '.join([*chain, following])} is a cycle; remove one extends"
            )
        chain.append(following)
        layers.append(_read_recipe(following))
        following = _extended(layers[-1].pop("extends", None), following)
    values: dict[str, Any] = {}
    for layer in reversed(layers):
        values = merge(values, layer)
    return values


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe.endswith(_FILES):
        return read_yaml(recipe)
    if recipe not in list_recipes():
        error = unknown("recipe", recipe, list_recipes())
        raise ConfigError(f"{error} (accepted: {', '.join(list_recipes())}, or a .yaml file)")
    with resources.as_file(resources.files("localvit.config") / "recipes" / f"{recipe}.yaml") as path:
        return read_yaml(path)


def _extended(name: Any, by: str) -> str | None:
    """Return the recipe that `by` extends; a file as a full path, to detect cycles."""
    if name is None or (isinstance(name, str) and not name.endswith(_FILES)):
        return name
    if not isinstance(name, str):
        raise ConfigError(f"recipe {by!r}: extends={name!r} is not accepted; use a recipe's name")
    return str((Path(by).parent / name).resolve())


def parse_setting(setting: str) -> dict[str, Any]:
    """Parse `"optim.lr=1e-3"` to `{"optim": {"lr": "1e-3"}}`; the value is YAML.

    Raises:
        ConfigError: if the `=` is missing, or as `parse_yaml`.
    """
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"setting {setting!r} is not accepted; use key=value, e.g. optim.lr=1e-3")
    value = parse_yaml(text, f"setting {setting!r}")
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by the values of `over`, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        # An empty mapping is a value, not "no change": `locality: {}` is locality with its defaults.
        merged[key] = merge(merged[key], value) if both and value else value
    return merged


def resolve(
    recipe: str | None = None, settings: Sequence[str] = (), explicit: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Return the configuration of its layers; each overrides those before it.

    Args:
        recipe: Name or YAML file.
        settings: `key=value` strings with dotted keys.
        explicit: Nested mapping, e.g. of command-line flags.
    """
    values: dict[str, Any] = load_recipe(recipe) if recipe else {}
    for setting in settings:
        values = merge(values, parse_setting(setting))
    return build(TrainConfig, merge(values, explicit or {}))
