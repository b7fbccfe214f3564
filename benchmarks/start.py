"""Time until help is printed and until the package is imported, in fresh processes with warm file caches.

Run: python benchmarks/start.py [--rounds N]

Prints a table of medians with quartiles, and of `import localvit, timm` against `import timm` the ratio in
turns.
"""

import argparse
import statistics
import subprocess
import sys
import time

from localvit.cli import VERBS


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def line(name: str, values: list[float], unit: str = "s") -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{name:28} {median:6.2f} {unit}   ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    for verb in ("", *VERBS):
        command = ["-m", "localvit", *([verb] if verb else []), "--help"]
        seconds(*command)
        print(line(" ".join(command[1:]), [seconds(*command) for _ in range(rounds)]))
    pairs = [
        (seconds("-c", "import localvit, timm"), seconds("-c", "import timm")) for _ in range(rounds + 1)
    ]
    print(line("import localvit, timm", [ours for ours, _ in pairs[1:]]))
    print(line("import timm", [theirs for _, theirs in pairs[1:]]))
    print(line("ratio", [ours / theirs for ours, theirs in pairs[1:]], " "))


if __name__ == "__main__":
    main()
