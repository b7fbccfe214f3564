"""Linear layers by oneDNN with weights packed for one use."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from localvit.locality.kernels import packed

from .test_lean import check_step, feed_forward
from .test_native_build import needs_compiler

needs_packed = pytest.mark.skipif(not packed.packed_available(), reason="no packed linear layers here")


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """Rows of the products that oneDNN computes from now on."""
    rows, original = [], packed.packed_linear

    def noted(x, *rest):
        rows.append(x.numel() // x.shape[-1])
        return original(x, *rest)

    monkeypatch.setattr(packed, "packed_linear", noted)
    return rows


@needs_packed
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [None, torch.randn(24)])
def test_it_is_a_linear_layer(monkeypatch, taken, turned, bias):
    monkeypatch.setenv("LOCALVIT_LINEAR", "packed")
    x = torch.randn(4, 800, 16)
    weight = torch.randn(16, 24).t() if turned else torch.randn(24, 16)
    torch.testing.assert_close(packed.linear_once(x, weight, bias), F.linear(x, weight, bias))
    assert taken == [3200]


@needs_packed
@pytest.mark.parametrize(
    ("asked", "not_intel", "rows", "packs"),
    [
        ("", True, 3200, True),
        ("", False, 3200, False),
        ("", True, 320, False),
        ("linear", True, 3200, False),
        ("conv", True, 3200, False),
        ("packed", False, 3200, True),
        ("packed", False, 320, False),
    ],
)
def test_a_rule_decides(monkeypatch, taken, asked, not_intel, rows, packs):
    monkeypatch.setenv("LOCALVIT_LINEAR", asked)
    monkeypatch.setattr(packed, "_not_intel", lambda: not_intel)
    packed.linear_once(torch.randn(rows, 16), torch.randn(24, 16))
    assert taken == ([rows] if packs else [])


def test_no_other_word_is_accepted(monkeypatch):
    monkeypatch.setenv("LOCALVIT_LINEAR", "mkl")
    with pytest.raises(ValueError, match="LOCALVIT_LINEAR='mkl' is not accepted"):
        packed.linear_once(torch.zeros(3200, 16), torch.zeros(24, 16))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", True),
        ("vendor_id\t: GenuineIntel\n", False),
        ("CPU implementer : 0x41\n", False),  # ARM says no vendor
    ],
)
def test_the_maker_of_the_processor(monkeypatch, text, want):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert packed._not_intel.__wrapped__() is want


def test_without_such_a_file_nothing_is_known(monkeypatch):
    def missing(self, encoding):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert packed._not_intel.__wrapped__() is False


def test_memory_that_is_given_is_taken():
    x, weight, memory = torch.randn(2, 5, 16), torch.randn(24, 16), torch.empty(2, 5, 24)
    assert packed.linear_once(x, weight, None, memory) is memory
    torch.testing.assert_close(memory, F.linear(x, weight))


@needs_packed
@needs_compiler
def test_a_training_step_with_it_equals_the_plain_modules(monkeypatch, taken):
    ffn, x = feed_forward(dim=16).float(), torch.randn(256, 14, 16, requires_grad=True)
    monkeypatch.setenv("LOCALVIT_LINEAR", "packed")
    check_step(monkeypatch, ffn, x, "NativeSteps", atol=2e-3)  # sums over many tokens
    assert taken == [256 * 12] * 4  # forward and backward through both layers
