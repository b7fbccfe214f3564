"""Time what is asked at every call before the native kernels stand in for the plain modules.

python benchmarks/question.py
"""

import time

import torch

from localvit import LocalityConfig, LocalityFeedForward
from localvit.acceleration.dispatch import native_form
from localvit.acceleration.kernels import plain_kernels
from localvit.acceleration.native.form import applies
from localvit.bench.measure import Quartiles

CALLS, ROUNDS = 2000, 21


def main() -> None:
    x = torch.randn(2, 197, 192)
    for gate in ("none", "eca", "se"):
        ffn = LocalityFeedForward(192, LocalityConfig(gate=gate))
        form = native_form(ffn)
        if form is None:
            raise SystemExit("there are no native kernels here")
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(CALLS):
                plain_kernels() or applies(native_form(ffn), x)
            times.append((time.perf_counter() - start) / CALLS * 1e6)
        print(f"gate {gate}: {Quartiles.of(times)} us")


if __name__ == "__main__":
    main()
