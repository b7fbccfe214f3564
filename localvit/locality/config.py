"""Design space of locality in a feed-forward network, as one frozen, JSON-serialisable value."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from localvit.errors import ConfigError, suggestion

Init = Literal["paper", "preserve"]
Position = Literal["mid", "first"]
Activation = Literal["none", "relu", "relu6", "hardswish", "gelu", "gelu_tanh", "silu"]
Glu = Literal["none", "gate", "both"]
Gate = Literal["none", "se", "eca", "eca_hard"]
Norm = Literal["none", "batch", "layer", "group"]
NormOrder = Literal["norm-act", "act-norm"]
Prefix = Literal["skip", "pointwise", "identity"]

# Values of fields left at None. "base" is not a value of any field: the existing FFN decides, so the field
# stays None. (With init="preserve" an explicit value then contradicts `init`.)
_BASE = "base"
_DECIDED: dict[Init, dict[str, Any]] = {
    "paper": {
        "activation": "hardswish",
        "gate": "se",
        "expansion": _BASE,
        "norm": "batch",
        "bias": False,
        "inner_skip": False,
        "prenorm": False,
        "drop_path": False,
        "layer_scale": False,
        "prefix": "skip",
    },
    "preserve": {
        "activation": _BASE,
        "gate": "none",
        "expansion": _BASE,
        "norm": "none",
        "bias": _BASE,
        "inner_skip": True,
        "prenorm": True,
        "drop_path": True,
        "layer_scale": True,
        "prefix": "pointwise",
    },
}
OLDER_VALUES: Mapping[str, Mapping[str, str]] = {
    "prefix": {"bypass": "skip", "mlp": "pointwise", "passthrough": "identity"}
}
"""Values of version 0.3: field -> old value -> new value. Files are translated on reading."""

# Squeeze units of the SE gate when neither `gate_width` nor `gate_reduction` is given: what the paper's
# LocalViT-T and -S have (hidden 768 // 192 and 1536 // 384).
DEFAULT_GATE_WIDTH = 4
# Ratio of hidden width to `dim` if there is no existing FFN: DeiT's and the paper's.
DEFAULT_EXPANSION = 4.0


@dataclass(frozen=True, kw_only=True)
class LocalityConfig:
    """Design of locality in a feed-forward network (FFN).

    There are two starting points. `LocalityConfig()` is the FFN of LocalViT-T/-S (Li et al., arXiv
    2104.05707, sections 3.3-3.5): it *replaces* the FFN of a block. `LocalityConfig(init="preserve")` *adds*
    a depth-wise convolution to the existing FFN, starting as an exact no-op, which suits pretrained weights.
    `init` decides the fields left at `None`; `resolve` returns the result.

    Args:
        init: `"paper"` or `"preserve"`.
        kernel_size: Odd side of the square depth-wise kernel. 3 is the paper's.
        depthwise: `False` leaves the convolution out (the paper's control, table 1); the depth-wise
            fields must then keep their defaults.
        position: `"mid"`: between expansion and projection, on the expanded channels. `"first"`:
            before the expansion, on `dim` channels.
        activation: One value for both places, or a pair (after the expansion, after the depth-wise
            convolution). With `glu` one value, for the gate. Paper: `"hardswish"`. Preserve: the
            FFN's own.
        glu: Gated linear unit (Shazeer, arXiv 2002.05202): the expansion makes two maps, a gate and a
            value, and the hidden map is `activation(gate) * value`. `"gate"`: the depth-wise
            convolution is on the gate, `"both"`: on both maps. Paper: `"none"`.
        gate: Channel gate on the hidden map: `"se"` (squeeze-and-excitation with a hard sigmoid),
            `"eca"` (sigmoid), `"eca_hard"` (hard sigmoid) or `"none"`. Paper: `"se"`.
        gate_reduction: SE squeeze width as `hidden // gate_reduction` (the paper's "reduction").
            `"dim"` stands for the token width, as in the paper's PVT and TNT.
        gate_width: SE squeeze width in units. With neither given it is 4, as in LocalViT-T and -S.
        expansion: Hidden width as a multiple of `dim`. Default: that of the existing FFN (4 in DeiT, Swin
            and TNT, 8 and 4 in PVT, 2 in T2T-ViT-7), which is the paper's choice; with `glu`, two thirds
            of that, so that the point-wise layers keep their number of parameters.
        norm: One value, or a triple (after the expansion, the depth-wise convolution, the projection).
            Paper: `"batch"`.
        norm_groups: Number of groups where `norm` is `"group"`; it must divide the channels. 32 is
            the default of Wu & He, "Group Normalization", 2018.
        norm_order: Norm before or after the activation.
        bias: Give convolutions a bias: one value, or a triple as for `norm`. Paper: no (a norm follows each).
        inner_skip: Add the input of the depth-wise stage to the output of its convolution. Paper: no.
        prenorm: Keep the block's norm in front of the FFN. Paper: no.
        drop_path: Keep stochastic depth on the FFN branch. Paper: no.
        layer_scale: Keep LayerScale on the FFN branch where the base has it. Paper: no.
        prefix: Path of class, distillation and register tokens. `"skip"` (paper): they skip the FFN.
            `"pointwise"`: they take the point-wise path without the depth-wise stage and gate. If the only
            activation is in that stage, it is applied to them too, so that their path is not linear.
            `"identity"`: the FFN returns them unchanged, so the block's residual adds them.

    Raises:
        ConfigError: for a value that is not listed, and for an explicit value that contradicts `init`.
    """

    init: Init = "paper"
    kernel_size: int = 3
    depthwise: bool = True
    position: Position = "mid"
    activation: Activation | tuple[Activation, Activation] | None = None
    glu: Glu = "none"
    gate: Gate | None = None
    gate_reduction: float | Literal["dim"] | None = None
    gate_width: int | None = None
    expansion: float | None = None
    norm: Norm | tuple[Norm, Norm, Norm] | None = None
    norm_groups: int = 32
    norm_order: NormOrder = "norm-act"
    bias: bool | tuple[bool, bool, bool] | None = None
    inner_skip: bool | None = None
    prenorm: bool | None = None
    drop_path: bool | None = None
    layer_scale: bool | None = None
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        self._check_ranges()
        self._check_init()
        self._check_combinations()
        self._check_glu()

    def _check_ranges(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise _error("kernel_size", self.kernel_size, "a positive odd integer")
        for name in ("gate_reduction", "gate_width", "expansion", "norm_groups"):
            value = getattr(self, name)
            if value not in (None, "dim") and not 0 < value < float("inf"):
                raise _error(name, value, "a positive number")

    def _check_init(self) -> None:
        for name, decided in _DECIDED[self.init].items():
            value = getattr(self, name)
            if self.init == "preserve" and value is not None and value != decided:
                accepted = "None, the FFN's own" if decided == _BASE else f"{decided!r} or None"
                raise ConfigError(f"{name}={value!r} contradicts init='preserve'; use {accepted}")
        for name, default in (("position", "mid"), ("depthwise", True), ("glu", "none")):
            if self.init == "preserve" and getattr(self, name) != default:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} contradicts init='preserve', which puts one depth-wise "
                    f"convolution on the hidden map of the existing FFN; use {default!r}"
                )

    def _check_combinations(self) -> None:
        resolved_gate = self.gate if self.gate is not None else _DECIDED[self.init]["gate"]
        for name in ("gate_reduction", "gate_width"):
            if getattr(self, name) is not None and resolved_gate != "se":
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} needs gate='se', not {resolved_gate!r}; change one"
                )
        if self.gate_reduction is not None and self.gate_width is not None:
            raise ConfigError(
                f"gate_reduction={self.gate_reduction!r} and gate_width={self.gate_width!r} both set the "
                "squeeze width of the gate; use one"
            )
        if not self.depthwise:
            for name, default in (("kernel_size", 3), ("position", "mid"), ("inner_skip", None)):
                if getattr(self, name) not in (default, False):
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} has no effect with depthwise=False; leave it out"
                    )

    def _check_glu(self) -> None:
        if self.glu == "none":
            return
        for name, default in (("position", "mid"), ("norm_order", "norm-act")):
            if getattr(self, name) != default:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} does not go with glu={self.glu!r}, which splits the "
                    f"expanded map and activates the gate last; use {default!r}"
                )
        if isinstance(self.activation, tuple):
            raise ConfigError(
                f"activation={self.activation!r} does not go with glu={self.glu!r}, which has one "
                "activation, on the gate; use one value"
            )

    def resolve(self) -> Self:
        """Fill in every field that `init` decides.

        Fields that the FFN being replaced decides stay `None` (`init="preserve"` only).
        """
        decided = {k: v for k, v in _DECIDED[self.init].items() if v != _BASE}
        return dataclasses.replace(self, **{k: v for k, v in decided.items() if getattr(self, k) is None})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as JSON values.

        Defaults are left out so that a stored hash of this dictionary survives the addition of fields.
        """
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return {f.name: list(v) if isinstance(v, tuple) else v for f, v in values if v != f.default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, older: bool = False) -> Self:
        """Make a configuration from a mapping as `to_dict` returns it.

        With the key `"preset"`, the other keys override the fields of that preset.

        Args:
            values: Field -> value.
            older: Accept the values of version 0.3, for files.

        Raises:
            ConfigError: if `values` is not a mapping, has an unknown key or a bad value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"locality={values!r} is not accepted; use a mapping of field to value")
        if "preset" in values:
            from localvit.locality.presets import find_preset  # which imports this module

            given = {name: value for name, value in values.items() if name != "preset"}
            values = find_preset(values["preset"]).to_dict() | given
        if older:
            values = {name: _newer(name, value) for name, value in values.items()}
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"LocalityConfig has no field {key!r}; {suggestion(key, names)}")
        return cls(**values)


def _newer(name: str, value: Any) -> Any:
    return OLDER_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def _error(name: str, value: object, accepted: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} is not accepted; use {accepted}")


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Convert `value` to the type of its annotation (a list to a tuple, an int to a float), or refuse it."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = typing.get_args(kind) if is_union else (kind,)
    value = tuple(value) if isinstance(value, list) else value
    if not any(_accepts(option, value) for option in options):
        if (now := _newer(name, value)) != value:
            raise ConfigError(f"{name}={value!r} is not accepted since version 0.4; write {name}={now!r}")
        raise _error(name, value, " | ".join(map(_describe, options)))
    return float(value) if type(value) is int and float in options else value


def _accepts(kind: Any, value: Any) -> bool:
    items = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in items
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_accepts, items, value))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _describe(kind: Any) -> str:
    items = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(repr, items))
    names = {int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return f"a list of {len(items)} of these" if items else names[kind]
