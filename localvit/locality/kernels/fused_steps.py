"""The lean pass with kernels of one pass through memory each; matrix products stay PyTorch's.

Two sets of kernels are its operators, with the same functions by the same names: Triton's and native ones.
"""

from typing import Any

import torch
from torch import Tensor, nn

from localvit.locality.grid import map_to_tokens, tokens_to_map, tokens_to_row
from localvit.locality.kernels.backend import backend_for
from localvit.locality.kernels.packed import plain_linear
from localvit.locality.kernels.pieces import activation
from localvit.locality.kernels.steps import Pass, Steps, Tensors

# As the kernels number them.
_KINDS = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)
_NUMBERS = {activation(kind()): number for number, kind in enumerate(_KINDS)}


class FusedSteps(Steps):
    """The steps of a pass whose norms 1 and 2 are by batch statistics, without prefix tokens that ride along.

    Subclasses name the operators, and what else they have kernels for.
    """

    operators: Any

    linear = staticmethod(plain_linear)
    """``F.linear``, whose result may be in memory that is given for it."""

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (uncorrected) for each channel of tokens (B, N, D)."""
        var, mean = torch.var_mean(x.float(), (0, 1), correction=0)
        return mean, var

    def pooled(self) -> Tensor:
        """Means (B, D) of the activated map."""
        return self.stage(2).value(self.kept["convolved"]).mean((2, 3))

    def gated_tokens(self) -> Tensor:
        """The gated map (B, N, D), once more, in memory of its own."""
        return map_to_tokens(self.gated())

    def through_norm(self, patches: Tensor, of_weight: Tensor, of_bias: Tensor) -> Tensor:
        """Gradient of the expanded tokens from that of the normalised ones, whose memory it takes."""
        self.stage(1).through_norm(tokens_to_row(patches), self.kept["expanded"], of_weight, of_bias)
        return patches

    def forward(self) -> Tensor:
        how, p, kept = self.how, self.p, self.kept
        expanded = self.linear(self.x, p["fc1.weight"].flatten(1), p.get("fc1.bias"), None)
        kept["expanded"] = tokens_to_row(expanded)
        self._note(1, *self.moments(expanded))
        weight, bias = p["conv.weight"], p.get("conv.bias")
        height, width, _ = how.lattice
        convolved, mean, var = self.operators.depthwise(
            expanded, weight, bias, *self.stage(1).affine(), height, width, self._act(1)
        )
        kept["convolved"] = tokens_to_map(convolved, how.lattice)
        self._note(2, mean, var)
        if how.gate is not None:
            kept["pooled"] = self.pooled()
        gate, _ = self._gate_terms(convolved)
        projected = self.operators.gated_projection(
            convolved, *self.stage(2).affine(), gate, p["fc2.weight"].flatten(1), self._act(2)
        )
        if p.get("fc2.bias") is not None:
            projected = projected + p["fc2.bias"]
        row = tokens_to_row(projected)
        if 3 in how.norms:
            kept["projected"] = row
        return map_to_tokens(self.normalised(3, row))

    def backward(self, grad: Tensor) -> Tensors:
        how, kept, found = self.how, self.kept, self.found
        first, second = self.stage(1), self.stage(2)
        expanded, convolved = map_to_tokens(kept["expanded"]), map_to_tokens(kept["convolved"])
        tokens = self._projection_gradient(self.norm_gradient(tokens_to_row(grad.contiguous())))
        assert second.mean is not None
        sums = self.operators.gate_sums(
            tokens, convolved, *second.affine(), second.mean, second.deviation(), self._act(2)
        )
        gate, term = self._gate_terms(convolved, sums[0])
        found["norm2.weight"] = (gate * sums[3] + term * sums[4]).sum(0)
        found["norm2.bias"] = (gate * sums[1] + term * sums[2]).sum(0)
        back = second.coefficients(convolved, found["norm2.weight"], found["norm2.bias"])
        assert first.mean is not None
        patches, of_norm, found["conv.weight"] = self.operators.depthwise_backward(
            tokens, convolved, expanded, self.p["conv.weight"], [gate, term],
            [*second.affine(), *back], [*first.affine(), first.mean, first.deviation()],
            how.lattice.height, how.lattice.width, self._act(1), self._act(2),
        )  # fmt: skip
        found["norm1.bias"], found["norm1.weight"] = of_norm
        patches = self.through_norm(patches, found["norm1.weight"], found["norm1.bias"])
        self._linear_gradients("fc1", patches, self.x)
        if self.needed["x"]:
            found["x"] = self.linear(patches, self.p["fc1.weight"].flatten(1).t(), None, None)
        if "conv.bias" in self.p:  # a norm by batch statistics takes a constant away again
            found["conv.bias"] = torch.zeros_like(self.p["conv.bias"])
        return found

    def _projection_gradient(self, row: Tensor) -> Tensor:
        """Gradient of the gated tokens."""
        upward, gated = map_to_tokens(row), self.gated_tokens()
        self._linear_gradients("fc2", upward, gated)
        return self.linear(upward, self.p["fc2.weight"].flatten(1).t(), None, gated)

    def _linear_gradients(self, name: str, grad: Tensor, x: Tensor) -> None:
        weight, bias = self.p[f"{name}.weight"], f"{name}.bias"
        of_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1)
        self.found[f"{name}.weight"] = of_weight.view(weight.shape)
        if bias in self.p:
            self.found[bias] = grad.sum((0, 1))

    def _note(self, number: int, mean: Tensor, var: Tensor) -> None:
        self.kept[f"mean{number}"], self.kept[f"var{number}"] = mean, var
        self.how.norms[number].moved(mean, var, self.x.shape[0] * self.x.shape[1])

    def _act(self, number: int) -> int:
        return _NUMBERS[self.how.acts[number]]

    def _gate_terms(self, tokens: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gate values (B, D) in float32, and from their gradient the pooling's share of the map's."""
        batch, count, channels = tokens.shape
        gate, none = self.gate_values(), torch.zeros((batch, channels), device=tokens.device)
        if gate is None:
            return none + 1.0, none
        values = gate.flatten(1).float()
        if grad is None:
            return values, none
        return values, self.gate_gradient(grad.to(gate.dtype)).float() / count


def fused_steps(how: Pass, x: Tensor) -> type[Steps] | None:
    """The steps by the kernels that are chosen for ``x``; ``None`` if none, or not for this pass."""
    backend = backend_for(x)
    by_batch = all(i in how.norms and how.norms[i].batch for i in (1, 2))
    numbers = [_NUMBERS.get(how.acts[i]) for i in (1, 2)]
    if backend == "torch" or not by_batch or how.lattice.num_prefix_tokens > 0 or None in numbers:
        return None
    if backend == "triton":
        from localvit.locality.kernels.triton_steps import TritonSteps  # Triton need not be installed

        return TritonSteps
    from localvit.locality.kernels import native_ops
    from localvit.locality.kernels.native_steps import NativeSteps

    known = set(numbers) <= set(native_ops.ACTIVATIONS.values())
    return NativeSteps if known and native_ops.covers_convolution(how.ffn.conv) else None
