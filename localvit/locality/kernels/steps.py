"""The steps of the lean pass, by PyTorch's operators."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.locality.grid import Grid, after_prefix, map_to_tokens, tokens_to_map, tokens_to_row
from localvit.locality.kernels.pieces import (
    Activation,
    Norm,
    Stage,
    convolution_gradients,
    norm_mode,
)

Tensors = dict[str, Tensor]


class Pass(NamedTuple):
    """One forward pass, apart from its tensors.

    ``norms`` and ``acts`` are by number (1 after the expansion, 2 after the depth-wise convolution, 3
    after the projection, which has no activation); act 0 is that of prefix tokens instead of act 2.
    ``form`` computes.
    """

    ffn: nn.Module
    lattice: Grid
    names: tuple[str, ...]
    norms: dict[int, Norm]
    acts: dict[int, Activation]
    gate: Callable[[Tensor, Tensors], Tensor] | None
    padding: int
    form: "type[Steps]"


class Steps:
    """The tensors of one pass and the steps on them.

    ``kept`` goes from the forward to the backward pass. ``needed`` says which gradients are wanted, and
    ``found`` holds those that are known, by name.
    """

    def __init__(self, how: Pass, x: Tensor, parameters: Tensors) -> None:
        self.how, self.x, self.p = how, x, parameters
        self.prefix = how.lattice.num_prefix_tokens
        self.kept: Tensors = {}
        self.found: Tensors = {}
        self.needed: dict[str, bool] = {}

    def forward(self) -> Tensor:
        """The branch's output (B, P + N, C)."""
        how, p, kept = self.how, self.p, self.kept
        expanded = kept["expanded"] = F.conv2d(tokens_to_row(self.x), p["fc1.weight"], p.get("fc1.bias"))
        hidden = map_to_tokens(self._activated(1, expanded))
        patches, weight = tokens_to_map(hidden, how.lattice), p["conv.weight"]
        convolved = F.conv2d(patches, weight, p.get("conv.bias"), padding=how.padding, groups=len(weight))
        kept["convolved"] = convolved
        value = self._activated(2, convolved)
        if how.gate is not None:
            kept["pooled"] = value.mean((2, 3))
            gate = how.gate(kept["pooled"], p)[:, :, None, None]
            value = value * gate if value is convolved else value.mul_(gate)
        gated = after_prefix(how.acts[0].value(hidden[:, : self.prefix]), self.prefix, value)
        projected = F.conv2d(tokens_to_row(gated), p["fc2.weight"], p.get("fc2.bias"))
        if 3 in how.norms:
            kept["projected"] = projected
        return map_to_tokens(self.normalised(3, projected))

    def backward(self, grad: Tensor) -> Tensors:
        """Gradients by name: of all that is needed, and perhaps more."""
        how, kept, prefix = self.how, self.kept, self.prefix
        expanded = kept["expanded"]
        row = self.norm_gradient(tokens_to_row(grad.contiguous()))
        tokens = map_to_tokens(self.projection_gradient(row))
        patches = self._hidden_gradient(tokens_to_map(tokens, how.lattice))

        hidden = map_to_tokens(self.stage(1).value(expanded))
        padding, maps = how.padding, tokens_to_map(hidden, how.lattice)
        patches = self.convolution_gradient("conv", patches, maps, padding=padding)
        passing = how.acts[0].gradient(tokens[:, :prefix].clone(), hidden[:, :prefix])
        del tokens, hidden, maps
        row = tokens_to_row(after_prefix(passing, prefix, patches))
        row = self._stage_gradient(1, row, expanded)
        row = self.convolution_gradient("fc1", row, tokens_to_row(self.x), of_input=self.needed["x"])
        if self.needed["x"]:
            self.found["x"] = map_to_tokens(row)
        return self.found

    def gate_values(self) -> Tensor | None:
        """Gate values (B, D, 1, 1)."""
        gate = self.how.gate
        return None if gate is None else gate(self.kept["pooled"], self.p)[:, :, None, None]

    def gated(self) -> Tensor:
        """The gated map, once more."""
        return self.stage(2).value(self.kept["convolved"], self.gate_values())

    def projection_gradient(self, row: Tensor) -> Tensor:
        """Gradient of the gated map, with the prefix tokens in front."""
        how, prefix = self.how, self.prefix
        gated = self.gated()
        first = map_to_tokens(self.kept["expanded"])[:, :prefix]
        if prefix:
            first = how.acts[0].value(map_to_tokens(self.stage(1).value(tokens_to_row(first))))
        return self.convolution_gradient("fc2", row, tokens_to_row(after_prefix(first, prefix, gated)))

    def _hidden_gradient(self, patches: Tensor) -> Tensor:
        """Gradient of the convolved map from that of the gated one, whose memory it takes."""
        convolved, gate = self.kept["convolved"], self.gate_values()
        if gate is None:
            return self._stage_gradient(2, patches, convolved)
        pooled = self.gate_gradient(self.stage(2).pooled(patches, convolved))
        shift = (pooled / (convolved.shape[2] * convolved.shape[3]))[:, :, None, None]
        return self._stage_gradient(2, patches, convolved, gate, shift)

    def stage(self, number: int) -> Stage:
        norm, act = self.how.norms.get(number), self.how.acts[number]
        if norm is None:
            return Stage(None, act)
        statistics = (self.kept[f"mean{number}"], self.kept[f"var{number}"])
        return Stage(norm, act, *self._affine(number), *statistics)

    def _stage_gradient(self, number: int, grad: Tensor, x: Tensor, *gate: Tensor) -> Tensor:
        grad, *rest = self.stage(number).gradients(grad, x, *gate)
        names = (f"norm{number}.weight", f"norm{number}.bias")
        self.found.update({n: g for n, g in zip(names, rest, strict=True) if g is not None})
        return grad

    def gate_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the pooled means from that of the gate values; notes those of its parameters.

        The gate is small, so autograd differentiates it.
        """
        assert self.how.gate is not None
        parameters = {n: p.detach().requires_grad_() for n, p in self.p.items() if n.startswith("gate")}
        pooled = self.kept["pooled"].detach().requires_grad_()
        with torch.enable_grad():
            gate = self.how.gate(pooled, parameters)
        back, *rest = torch.autograd.grad(gate, [pooled, *parameters.values()], grad)
        self.found.update(zip(parameters, rest, strict=True))
        return back

    def _activated(self, number: int, x: Tensor) -> Tensor:
        """Norm and activation ``number``, of a map that is kept and so must stay as it is."""
        y, act = self.normalised(number, x), self.how.acts[number]
        return act.value(y) if y is x else act.in_place(y)

    def normalised(self, number: int, x: Tensor) -> Tensor:
        if number not in self.how.norms:
            return x
        weight, bias = self._affine(number)
        y, mean, var = self.how.norms[number](x, weight, bias)
        self.kept[f"mean{number}"], self.kept[f"var{number}"] = mean, var
        return y

    def norm_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the projected map."""
        if 3 not in self.how.norms:
            return grad
        statistics = (self.kept["mean3"], self.kept["var3"])
        projected, (weight, _) = self.kept["projected"], self._affine(3)
        grad, *rest = self.how.norms[3].gradients(grad, projected, weight, *statistics)
        self.found.update(zip(("norm3.weight", "norm3.bias"), rest, strict=True))
        return grad

    def _affine(self, number: int) -> tuple[Tensor, Tensor]:
        return self.p[f"norm{number}.weight"], self.p[f"norm{number}.bias"]

    def convolution_gradient(
        self, name: str, grad: Tensor, x: Tensor, *, padding: int = 0, of_input: bool = True
    ) -> Tensor:
        """Gradient of the input ``x`` of a convolution; notes those of its parameters."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        mask = [of_input, self.needed[weight], self.needed.get(bias, False)]
        back, *rest = convolution_gradients(grad, x, self.p[weight], mask, padding)
        self.found.update(zip((weight, bias), rest, strict=True))
        return back

    def differentiable(self, grad: Tensor) -> Tensors:
        """The gradients with a graph of their own, by way of the plain modules."""
        how = self.how
        ffn: Any = how.ffn
        for number, norm in how.norms.items():
            if norm_mode(getattr(ffn, f"norm{number}")) != norm.batch:
                raise RuntimeError(
                    "create_graph=True after a batch norm's mode was changed since the forward pass: "
                    "call backward first, or set LOCALVIT_PLAIN=1"
                )
        tensors = self.p | {name: buffer.clone() for name, buffer in ffn.named_buffers()}
        tensors = {f"ffn.{name}": tensor for name, tensor in tensors.items()}
        y = torch.func.functional_call(_PlainForm(ffn), tensors, (self.x, how.lattice))
        wanted = {name: t for name, t in {"x": self.x, **self.p}.items() if self.needed[name]}
        gradients = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True)
        return dict(zip(wanted, gradients, strict=True))


class _PlainForm(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor, lattice: Grid) -> Tensor:
        return self.ffn.plain(x, lattice)  # type: ignore[operator]
