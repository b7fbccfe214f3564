"""Delta files: the weights that locality adds to a model, without the model.

A delta is a safetensors file. Its metadata has the recipe of the surgery and a digest of the base's weights,
because the new weights are useful only with that base. Several deltas can share one base: loading another one
into the localized model switches between them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from localvit.atomic import check_folder_of, write_atomically
from localvit.errors import ConfigError, one_line
from localvit.structure import build, parse_json, to_json
from localvit.surgery import (
    Recipe,
    locality_parameters,
    localize,
    plan_changes,
    refuse_wrapped,
    restore,
)
from localvit.version import __version__

State = dict[str, Tensor]

_METADATA = "localvit"  # key in the file


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Metadata of a delta file.

    Attributes:
        recipe: Surgery that the weights belong to.
        num_classes: Outputs of the classifier in the file; `None` if it has none.
        base: Digest of the base's weights.
        weights: Digest of the weights in the file, to detect damage.
        versions: Package -> version that wrote the file, for information only.
    """

    recipe: Recipe
    num_classes: int | None
    base: str
    weights: str
    versions: dict[str, str]


def save_locality(model: nn.Module, file: str | Path, *, head: bool = False, overwrite: bool = False) -> None:
    """Save the weights that locality added to a model, in the model's dtype.

    For ViT-S and `init="preserve"` these are 0.66 MB. Weights of PEFT's LoRA are not in the file; PEFT saves
    them. The file loads into the base as it is now: if its weights were trained too, not into the pretrained
    model. There is a warning where they have gradients.

    Args:
        model: A localized model, or a `PeftModel` of one.
        file: The file (`*.safetensors`).
        head: Save the classifier too.
        overwrite: Replace a file that exists.

    Raises:
        ConfigError: if the model is not localized or has no classifier to save, or if the file exists or its
            folder does not.
        UnsupportedModelError: if the model is wrapped or compiled.
        OSError: if the file cannot be written.
    """
    model, file = _unwrapped(model, "save"), Path(file)
    if (recipe := Recipe.of(model)) is None:
        raise ConfigError("the model is not localized; localvit.localize does that")
    if file.exists() and not overwrite:
        raise ConfigError(f"{str(file)!r} exists; name another file, or use overwrite=True")
    check_folder_of(file, "file=")
    local, classifier, base = _parts(model)
    if head and not classifier:
        raise ConfigError(
            f"head=True: {type(model).__name__} has no classifier that get_classifier returns; use head=False"
        )
    if any(p.grad is not None and n in base for n, p in model.named_parameters()):
        warnings.warn(
            f"weights of the base have gradients. If they were trained, {str(file)!r} does not load into the "
            "pretrained model; save the whole model, or freeze them (localvit.locality_parameters)",
            stacklevel=2,
        )
    weights = local | (classifier if head else {})
    delta = Delta(
        recipe=recipe,
        num_classes=int(model.num_classes) if head else None,  # type: ignore[arg-type]
        base=base_digest(model),
        weights=_digest(weights),
        versions={"localvit": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
    )
    contiguous = {name: value.cpu().contiguous() for name, value in weights.items()}
    write_atomically(file, save(contiguous, {_METADATA: to_json(delta, indent=None)}))


def load_locality(model: nn.Module, file: str | Path) -> None:
    """Load weights that `save_locality` wrote into their base, in place.

    A plain model is localized first; `localvit.restore` undoes that. In a model localized with the same
    recipe, the weights in the file replace the current ones. A classifier in the file replaces the model's.

    Args:
        model: The base, plain or localized, or a `PeftModel` of it.
        file: The file; nothing in it is executed.

    Raises:
        ConfigError: if the file is damaged or not a delta file, if it belongs to another base or recipe, or
            if the model cannot be localized.
        UnsupportedModelError: if the model is wrapped or compiled. In both cases the model does not change.
    """
    model = _unwrapped(model, "load into")
    delta, weights = _read(file)
    present, headless = Recipe.of(model), delta.num_classes is not None and not head_parameters(model)
    if headless and not hasattr(model, "reset_classifier"):
        raise ConfigError(f"{str(file)!r} has a classifier; {type(model).__name__} has no reset_classifier")
    if present is None:
        _localize(model, delta, weights, file)
    elif present != delta.recipe:
        raise ConfigError(f"{str(file)!r} does not have the recipe of the model; use localvit.restore first")
    try:
        if headless:
            _set_classes(model, delta.num_classes)
        _check(model, delta, weights, file)
    except ConfigError:
        if headless:
            _set_classes(model, 0)
        if present is None:
            restore(model)
        raise
    if delta.num_classes not in (None, model.num_classes):
        _set_classes(model, delta.num_classes)
    model.load_state_dict(weights, strict=False)


def head_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters of a model's classifiers, in the model's order."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own]


def base_digest(model: nn.Module) -> str:
    """Return the digest of a localized model's weights without those of locality, LoRA and classifier."""
    return _digest(_parts(model)[2])


def add_to_digest(digest: hashlib._Hash, state: Mapping[str, Tensor]) -> None:
    """Update `digest` with names and bytes of tensors."""
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _digest(state: State) -> str:
    digest = hashlib.sha256()
    add_to_digest(digest, dict(sorted(state.items())))
    return digest.hexdigest()


def _parts(model: nn.Module) -> tuple[State, State, State]:
    """Return the state of locality, of the classifiers and of the base."""
    # Buffers, such as the running statistics of a norm, belong to the module of the parameters.
    local = {name.rpartition(".")[0] for name, _ in locality_parameters(model)}
    heads = {name.rpartition(".")[0] for name, _ in head_parameters(model)}
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    parts: tuple[State, State, State] = {}, {}, {}
    for name, value in model.state_dict().items():
        owner = name.rpartition(".")[0]
        part = 0 if owner in local else 1 if owner in heads else 2
        # LoRA wraps linear layers: this renames the base's weights, and adds some that are not the base's.
        for path in wrapped if part == 2 else ():
            if name.startswith(f"{path}."):
                own, _, rest = name.removeprefix(f"{path}.").partition(".")
                name = f"{path}.{rest}" if own == "base_layer" else ""
        if name:
            parts[part][name] = value.detach()
    return parts


def _unwrapped(model: nn.Module, action: str) -> nn.Module:
    if hasattr(model, "get_base_model"):  # PeftModel
        model = model.get_base_model()  # type: ignore[operator]
    refuse_wrapped(model, action)
    return model


def _read(file: str | Path) -> tuple[Delta, State]:
    where = repr(str(file))
    try:
        with safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where} cannot be read as safetensors: {one_line(error)}") from error
    if _METADATA not in metadata:
        raise ConfigError(f"{where} is not a delta file; localvit.save_locality makes one")
    delta = build(Delta, parse_json(metadata[_METADATA], where), where)
    sizes = [value.shape[0] for value in weights.values() if value.ndim]
    if _digest(weights) != delta.weights or delta.num_classes not in (None, *sizes):
        raise ConfigError(f"{where} is damaged: its weights differ from those saved; save it again")
    return delta, weights


def _localize(model: nn.Module, delta: Delta, weights: State, file: str | Path) -> None:
    recipe = delta.recipe
    try:
        plan, _ = plan_changes(model, recipe.locality, recipe.blocks, recipe.also, count=False)
        before, after = plan.parameters
        if after - before > sum(value.numel() for value in weights.values()):
            raise ValueError("its recipe needs more weights than it contains")  # a huge kernel, say
        localize(model, recipe.locality, recipe.blocks, also=recipe.also, seed=0, count_macs=False)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{str(file)!r} does not fit the model: {one_line(error)}") from error


def _check(model: nn.Module, delta: Delta, weights: State, file: str | Path) -> None:
    """Refuse weights that do not fit a localized model."""
    where = repr(str(file))
    if (found := base_digest(model)) != delta.base:
        raise ConfigError(
            f"{where} belongs to a base with the weights {delta.base[:12]}, and this one has {found[:12]}; "
            "load it into the pretrained model that was localized, built for the same image size"
        )
    local, classifier, _ = _parts(model)
    expected = {name: (value.dtype, value.shape) for name, value in local.items()}
    if delta.num_classes is not None:
        for name, value in classifier.items():
            expected[name] = value.dtype, torch.Size([delta.num_classes, *value.shape[1:]])
    given = {name: (value.dtype, value.shape) for name, value in weights.items()}
    if wrong := sorted(name for name in expected | given if expected.get(name) != given.get(name)):
        raise ConfigError(
            f"{where} does not fit the model: {wrong[0]} is missing, unknown or reshaped; save it again"
        )


def _set_classes(model: nn.Module, num_classes: int | None) -> None:
    with torch.random.fork_rng(devices=[]):
        model.reset_classifier(num_classes)  # type: ignore[operator]
