"""Selective activation checkpointing: the same bits with less kept, for every design."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import localvit
from localvit import PRESETS, LocalityConfig
from localvit.acceleration.kernels import VARIABLE

from .steps import feed_forward, images, spy, step
from .test_native import kept

DESIGNS = {
    **PRESETS,
    "eca": LocalityConfig(gate="eca"),
    "prefix rides along": LocalityConfig(prefix="pointwise"),
    "layer norms": LocalityConfig(norm="layer"),
    "group norms": LocalityConfig(norm="group", norm_groups=4),
    "first": LocalityConfig(position="first"),
    "pointwise": LocalityConfig(depthwise=False),
    "silu, skip": LocalityConfig(activation="silu", inner_skip=True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", DESIGNS.values(), ids=DESIGNS)
def test_bits_are_those_of_the_plain_modules(monkeypatch, config, training):
    monkeypatch.setenv(VARIABLE, "plain")
    ffn, tokens = feed_forward(config).train(training), images()
    want, before = step(ffn, tokens), kept(ffn, tokens)
    assert localvit.set_selective_checkpointing(ffn) == 1
    used = spy(monkeypatch)
    torch.testing.assert_close(step(ffn, tokens), want, rtol=0, atol=0)
    assert used == ["checkpointed"]
    localvit.set_selective_checkpointing(ffn, False)
    assert kept(ffn, tokens) == before
    torch.testing.assert_close(step(ffn, tokens), want, rtol=0, atol=0)


@pytest.mark.parametrize("config", DESIGNS.values(), ids=DESIGNS)
def test_products_run_once(monkeypatch, config):
    """All but the gate's, which are of single vectors: 2 of them by (64, 4) for each of 3 images, or a 1-D
    one."""
    monkeypatch.setenv(VARIABLE, "plain")
    counts = []
    for selective in (False, True):
        ffn = feed_forward(config)
        localvit.set_selective_checkpointing(ffn, selective)
        with FlopCounterMode(display=False) as counter:
            step(ffn, images())
        counts.append(counter.get_total_flops())
    gate = {"se": 2 * 2 * 3 * 64 * 4, "eca": 2 * 3 * 64 * 3}.get(ffn.config.gate, 0)
    assert 0 <= counts[1] - counts[0] <= gate


def test_modules_without_locality_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), feed_forward(), feed_forward())
    assert localvit.set_selective_checkpointing(model) == 2
    assert not hasattr(model[0], "selective_checkpointing")
