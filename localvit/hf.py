"""Localized models of Hugging Face's transformers in folders: weights, configuration and recipe, no code.

A folder has `model.safetensors` and a `config.json` whose key `localvit` is the recipe. Nothing in it is
executed: the class is one of transformers' own with an adapter, by name.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from localvit.atomic import move_into_place, temporary_prefix, writing
from localvit.errors import ConfigError, suggestion
from localvit.structure import build, parse_json, plain
from localvit.surgery import Recipe, accepted_classes, localize

_RECIPE, _WEIGHTS = "localvit", "model.safetensors"


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Save a localized model of transformers to a new folder, after `Trainer` too (`trainer.model`).

    Raises:
        ConfigError: if the model is not a localized one of transformers, or if `folder` has files.
    """
    from safetensors.torch import save_model

    recipe = Recipe.of(model)
    if recipe is None or not hasattr(model, "config"):
        raise ConfigError(
            f"this {type(model).__name__} is not a localized model of transformers; localize it, or save it "
            "with its own library"
        )
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{str(folder)!r} already has files; name a new folder")
    config: Any = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    setattr(config, _RECIPE, plain(recipe))
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=temporary_prefix(place.name), dir=place.parent))
        config.save_pretrained(new)
        save_model(model, str(new / _WEIGHTS))
        move_into_place(new, place)


def from_pretrained(folder: str | Path) -> Any:
    """Return the model that `save_pretrained` saved, in evaluation mode, on the CPU, in its dtype.

    Raises:
        ConfigError: if `folder` does not hold such a model, or its weights do not fit its configuration.
    """
    import transformers
    from safetensors.torch import load_model

    place = Path(folder)
    try:
        values = parse_json((place / "config.json").read_text(), str(place / "config.json"))
    except OSError as error:
        raise ConfigError(
            f"{str(folder)!r} has no config.json; use a folder that save_pretrained wrote"
        ) from error
    found, name = values.pop(_RECIPE, None), (values.get("architectures") or [""])[0]
    if found is None:
        raise ConfigError(f"{str(folder)!r} has no recipe; open a plain model with transformers itself")
    recipe = build(Recipe, found, _RECIPE)
    known = {n.rpartition(".")[2]: n for n in accepted_classes() if n.startswith("transformers.")}
    if name not in known:
        raise ConfigError(f"{str(folder)!r}: architectures={name!r} is unknown; {suggestion(name, known)}")
    kind = getattr(transformers, name)
    model = kind(kind.config_class.from_dict(values))
    localize(model, recipe.locality, recipe.blocks, also=recipe.also, keep_originals=False, count_macs=False)
    model.to(model.config.dtype)
    try:
        load_model(model, str(place / _WEIGHTS))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"the weights in {str(folder)!r} do not fit its config.json: {error}") from error
    return model.eval()
