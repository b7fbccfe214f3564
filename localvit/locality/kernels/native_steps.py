"""The lean pass with the native kernels."""

from torch import Tensor

from localvit.locality.grid import map_to_tokens
from localvit.locality.kernels import native_ops
from localvit.locality.kernels.fused_steps import FusedSteps
from localvit.locality.kernels.packed import linear_once


class NativeSteps(FusedSteps):
    operators = native_ops

    linear = staticmethod(linear_once)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return native_ops.moments(x)

    def pooled(self) -> Tensor:
        return native_ops.pooled(map_to_tokens(self.kept["convolved"]), *self.stage(2).affine(), self._act(2))

    def gated_tokens(self) -> Tensor:
        convolved = map_to_tokens(self.kept["convolved"])
        gate, _ = self._gate_terms(convolved)
        return native_ops.activated(convolved, *self.stage(2).affine(), gate, self._act(2))

    def through_norm(self, patches: Tensor, of_weight: Tensor, of_bias: Tensor) -> Tensor:
        expanded = self.kept["expanded"]
        coefficients = self.stage(1).coefficients(expanded, of_weight, of_bias)
        native_ops.combine_(patches, map_to_tokens(expanded), *coefficients)
        return patches
