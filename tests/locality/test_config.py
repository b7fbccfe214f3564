import dataclasses
import json

import pytest
from hypothesis import given, strategies as st

from localvit import ConfigError, LocalityConfig

_PAPER = st.fixed_dictionaries(
    {},
    optional={
        "position": st.sampled_from(["mid", "first"]),
        "kernel_size": st.sampled_from([1, 3, 5, 7]),
        "activation": st.sampled_from(["relu6", "gelu", ["none", "gelu"], ["silu", "relu"]]),
        "expansion": st.floats(0.25, 8),
        "norm": st.sampled_from(["none", "layer", ["batch", "none", "group"]]),
        "norm_groups": st.integers(1, 64),
        "norm_order": st.sampled_from(["norm-act", "act-norm"]),
        "bias": st.sampled_from([True, False, [True, False, True]]),
        "inner_skip": st.booleans(),
        "prenorm": st.booleans(),
        "drop_path": st.booleans(),
        "layer_scale": st.booleans(),
        "prefix": st.sampled_from(["skip", "pointwise", "identity"]),
        "gate": st.sampled_from(["none", "se", "eca", "eca_hard"]),
    },
)


_GLU = st.fixed_dictionaries(
    {"glu": st.sampled_from(["gate", "both"])},
    optional={
        "kernel_size": st.sampled_from([1, 3, 5]),
        "activation": st.sampled_from(["gelu", "silu"]),
        "norm": st.sampled_from(["none", ["batch", "none", "group"]]),
        "prefix": st.sampled_from(["skip", "pointwise", "identity"]),
    },
)


@given(_PAPER | _GLU)
def test_round_trip_through_json(values):
    config = LocalityConfig(**values)
    assert LocalityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    resolved = config.resolve()
    assert resolved.resolve() == resolved
    assert LocalityConfig.from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved


def test_defaults_are_omitted_and_the_paper_is_the_default():
    assert LocalityConfig().to_dict() == {}
    assert LocalityConfig(init="preserve", kernel_size=5).to_dict() == {"init": "preserve", "kernel_size": 5}
    paper = LocalityConfig().resolve()
    assert (paper.activation, paper.gate, paper.expansion, paper.norm) == ("hardswish", "se", None, "batch")
    assert (paper.prenorm, paper.drop_path, paper.bias, paper.prefix) == (False, False, False, "skip")


def test_preserve_leaves_to_the_base_what_is_the_base_s():
    resolved = LocalityConfig(init="preserve").resolve()
    assert resolved.activation is None
    assert resolved.expansion is None
    assert resolved.bias is None
    assert (resolved.norm, resolved.gate, resolved.prefix, resolved.prenorm) == (
        "none",
        "none",
        "pointwise",
        True,
    )


def test_config_is_frozen_and_hashable():
    config = LocalityConfig(activation=["none", "gelu"])
    assert config.activation == ("none", "gelu")
    assert hash(config) == hash(LocalityConfig(activation=("none", "gelu")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kernel_size = 5


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kernel_size": 4}, ["kernel_size", "4", "odd"]),
        ({"kernel_size": 3.0}, ["kernel_size", "3.0", "integer"]),
        ({"kernel_size": True}, ["kernel_size", "True", "integer"]),
        ({"activation": "hswish"}, ["activation", "hswish", "hardswish"]),
        ({"activation": ["gelu"]}, ["activation", "gelu", "list of 2"]),
        ({"gate": "sse"}, ["gate", "sse", "'se'"]),
        ({"norm": ["batch", "batch"]}, ["norm", "list of 3"]),
        ({"expansion": 0}, ["expansion", "0", "positive"]),
        ({"expansion": float("nan")}, ["expansion", "nan", "positive"]),
        ({"expansion": "4"}, ["expansion", "'4'", "number"]),
        ({"gate_width": 0}, ["gate_width", "0", "positive"]),
        ({"bias": 1}, ["bias", "1", "true or false"]),
        ({"init": "preserved"}, ["init", "preserved", "'preserve'"]),
        ({"gate_reduction": 4, "gate_width": 4}, ["gate_reduction", "gate_width"]),
        ({"gate": "eca", "gate_width": 4}, ["gate_width", "se", "eca"]),
        ({"bias": [True, False]}, ["bias", "true or false", "list of 3"]),
        ({"glu": "conv"}, ["glu", "'conv'", "'gate', 'both'"]),
        ({"glu": "gate", "position": "first"}, ["position='first'", "glu='gate'", "'mid'"]),
        ({"glu": "both", "norm_order": "act-norm"}, ["norm_order='act-norm'", "glu='both'", "'norm-act'"]),
        (
            {"glu": "gate", "activation": ["none", "gelu"]},
            ["activation=('none', 'gelu')", "glu", "one value"],
        ),
        ({"depthwise": False, "kernel_size": 5}, ["kernel_size", "depthwise=False"]),
        ({"depthwise": False, "position": "first"}, ["position", "depthwise=False"]),
        ({"depthwise": False, "inner_skip": True}, ["inner_skip", "depthwise=False"]),
        ({"kernel": 3}, ["kernel", "kernel_size"]),
        ({"colour": 3}, ["colour", "accepted", "expansion"]),
    ],
)
def test_bad_values_are_named_with_what_is_accepted(values, named):
    with pytest.raises(ConfigError) as error:
        LocalityConfig.from_dict(values)
    assert all(word in str(error.value) for word in named), str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"activation": "gelu"},
        {"expansion": 4},
        {"bias": True},
        {"norm": "batch"},
        {"gate": "se"},
        {"inner_skip": False},
        {"prenorm": False},
        {"drop_path": False},
        {"layer_scale": False},
        {"prefix": "skip"},
        {"position": "first"},
        {"depthwise": False},
        {"glu": "gate"},
    ],
)
def test_what_contradicts_preserve_is_an_error_naming_both(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"{name}=.*contradicts init='preserve'"):
        LocalityConfig(init="preserve", **values)


def test_what_agrees_with_preserve_may_be_said():
    said = LocalityConfig(init="preserve", norm="none", gate="none", prefix="pointwise", prenorm=True)
    assert said.resolve() == LocalityConfig(init="preserve").resolve()


@pytest.mark.parametrize("values", [None, [], "init", 3])
def test_from_dict_wants_a_mapping(values):
    with pytest.raises(ConfigError, match="mapping"):
        LocalityConfig.from_dict(values)
