"""Numbers of every architecture with every design, compared with stored ones.

    python -m tests.test_numbers --reason "why the numbers changed"     # writes the stored numbers anew

Weights and images are functions of their names (`tests.golden.fill`), so the numbers depend neither on the
machine nor on how PyTorch draws random numbers.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

import localvit
from localvit import PRESETS, LocalityConfig
from tests.golden.fill import fill, is_filled, make_input

PLAIN = ("LOCALVIT_KERNELS", "plain")
STORED = Path(__file__).parent / "fixtures" / "numbers.json"
MODES = ("default", "plain")
# timm name -> arguments that make it small, for images of 64 x 64 and 5 classes.
FAMILIES: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3},
    "t2t_vit_7": {"embed_dim": 24, "depth": 3, "num_heads": 3, "token_dim": 16},
    "pvt_tiny": {"embed_dims": (8, 16, 20, 32), "depths": (1, 1, 1, 2)},
    "tnt_t_legacy_patch16_224": {"embed_dim": 24, "inner_dim": 12, "depth": 3}
    | {"num_heads_outer": 3, "num_heads_inner": 3},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
}
DESIGNS = {**PRESETS, "preserve": LocalityConfig(init="preserve")}
CASES = [f"{name} {design}" for name in FAMILIES for design in DESIGNS]
# All designs on one architecture, two of them on all.
TRAINED = [case for case in CASES if case.startswith("deit") or case.split()[1] in ("localvit", "preserve")]
STEPS, RATE = 5, 0.02
SUMS_RTOL = 1e-9  # float64: another order of addition changes about the 13th digit
WEIGHTS_RTOL = 1e-5  # float32, after five steps


def build(case: str, dtype: torch.dtype) -> nn.Module:
    """Build a small localized model with weights that are functions of their names."""
    name, design = case.split()
    model = timm.create_model(name, img_size=64, num_classes=5, **FAMILIES[name]).to(dtype)
    localvit.localize(model, DESIGNS[design], count_macs=False)
    state = model.state_dict()
    filled = {k: torch.from_numpy(np.array(fill(k, v.shape))) for k, v in state.items() if is_filled(k)}
    model.load_state_dict({**state, **filled})
    for module in model.modules():  # T2T-ViT and Swin drop at random by default
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make two images of 64 x 64 and their labels."""
    return torch.from_numpy(make_input(size=64)).to(dtype), torch.tensor([1, 3])


def norms(tensors: Iterator[Tensor | None]) -> list[float]:
    """Compute the norm of each tensor, 0 for `None`, to twelve significant digits."""
    return [0.0 if t is None else float(f"{t.detach().double().norm().item():.12g}") for t in tensors]


def by_name(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Sort by name, so that the order of definition does not matter."""
    return dict(sorted((name, t) for name, t in named if t.is_floating_point()))


def sums(case: str) -> dict[str, Any]:
    """Compute sums of the logits, the loss, and norms of gradients and running statistics, in float64."""
    model = build(case, torch.float64)
    images, labels = batch(torch.float64)
    images.requires_grad_()
    found: dict[str, Any] = {}
    with torch.no_grad():
        logits = model.eval()(images)
        found["eval"] = [logits.sum().item(), logits.square().sum().item()]
    logits = model.train()(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    found["train"] = [logits.sum().item(), logits.square().sum().item()]
    found["loss"] = [loss.item()]
    parameters = by_name(model.named_parameters())
    found["gradients"] = norms(t.grad for t in (images, *parameters.values()))
    found["buffers"] = norms(iter(by_name(model.named_buffers()).values()))
    return found


def trained(case: str) -> list[float]:
    """Compute the norm of each weight and buffer after some steps of SGD in float32."""
    model = build(case, torch.float32).train()
    images, labels = batch(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return norms(iter(by_name(iter(model.state_dict().items())).values()))


def parameter_names(case: str) -> list[str]:
    """List names in the order of the stored gradients."""
    return ["images", *by_name(build(case, torch.float64).named_parameters())]


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text())


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select the plain modules, or what is the default."""
    if request.param == "plain":
        monkeypatch.setenv(*PLAIN)
    else:
        monkeypatch.delenv(PLAIN[0], raising=False)
    return request.param


def test_the_stored_numbers_say_why_and_belong_to_these_cases(stored):
    assert stored["reason"].strip()
    assert list(stored["sums"]) == CASES
    assert list(stored["weights"]) == TRAINED
    assert STORED.stat().st_size < 300_000


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_the_stored_ones(case, mode, stored):
    got, want = sums(case), stored["sums"][case]
    for quantity in ("eval", "train", "loss", "buffers"):
        np.testing.assert_allclose(got[quantity], want[quantity], rtol=SUMS_RTOL, err_msg=quantity)
    assert len(got["gradients"]) == len(want["gradients"])
    # A bias in front of a batch norm has gradient zero in exact arithmetic; what is computed is rounding.
    atol = SUMS_RTOL * max(want["gradients"])
    close = np.isclose(got["gradients"], want["gradients"], rtol=SUMS_RTOL, atol=atol)
    assert close.all(), [name for name, ok in zip(parameter_names(case), close, strict=True) if not ok]


@pytest.mark.parametrize("case", TRAINED)
def test_weights_after_five_steps_are_the_stored_ones(case, mode, stored):
    got, want = trained(case), stored["weights"][case]
    np.testing.assert_allclose(got, want, rtol=WEIGHTS_RTOL)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_do_not_depend_on_the_random_state(name):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(sums(f"{name} localvit"))
    assert found[0] == found[1]


def test_training_moves_the_weights_by_more_than_the_tolerance():
    before = by_name(iter(build(CASES[0], torch.float32).state_dict().items()))
    moved = np.abs(np.array(trained(CASES[0])) / np.array(norms(iter(before.values()))) - 1)
    assert np.median(moved) > 10 * WEIGHTS_RTOL


def regenerate(reason: str) -> None:
    """Write the stored numbers anew, computed by the plain modules."""
    os.environ[PLAIN[0]] = PLAIN[1]
    torch.set_num_threads(1)
    versions = {module.__name__: module.__version__ for module in (localvit, torch, timm, np)}
    head = {"reason": reason, "versions": {"python": platform.python_version(), **versions}}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    for key, function, cases in (("sums", sums, CASES), ("weights", trained, TRAINED)):
        rows = [f'"{case}": {json.dumps(function(case))}' for case in cases]
        lines.append(f'"{key}": {{\n' + ",\n".join(rows) + "\n}")
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write tests/fixtures/numbers.json anew.")
    parser.add_argument("--reason", required=True, help="why the numbers changed")
    given = parser.parse_args().reason.strip()
    if not given:
        parser.error("--reason is empty; say why the numbers changed")
    regenerate(given)
