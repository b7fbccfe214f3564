"""Time the question that is asked at every call before the native kernels stand in for the plain modules.

CPU time of one thread, so other processes count little.

python benchmarks/question.py
"""

import time

import torch

from localvit import LocalityConfig, LocalityFeedForward
from localvit.acceleration.dispatch import training_form
from localvit.bench.measure import Quartiles

CALLS, ROUNDS = 2000, 21


def main() -> None:
    x = torch.randn(2, 197, 192)
    for gate in ("none", "eca", "se"):
        ffn = LocalityFeedForward(192, LocalityConfig(gate=gate))
        if training_form(ffn, x) is None:
            raise SystemExit("there are no native kernels here")
        times = []
        for _ in range(ROUNDS):
            start = time.thread_time()
            for _ in range(CALLS):
                training_form(ffn, x)
            times.append((time.thread_time() - start) / CALLS * 1e6)
        print(f"gate {gate}: {Quartiles.of(times)} us")


if __name__ == "__main__":
    main()
