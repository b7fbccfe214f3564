"""The lean pass with the Triton kernels."""

from localvit.locality.kernels import triton_ops
from localvit.locality.kernels.fused_steps import FusedSteps


class TritonSteps(FusedSteps):
    operators = triton_ops
