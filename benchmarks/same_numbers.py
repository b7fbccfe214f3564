"""Compare the numbers of two checkouts bit for bit: outputs, losses, gradients, trainings and a study.

    python benchmarks/same_numbers.py OLD NEW [--out FILE.md]

OLD and NEW are directories with a `localvit/` package. `digests.py` measures each in child processes, in
turns, on one CPU thread, with the plain modules. `--old-env` and `--new-env` choose another environment: with
no value the default one, which uses the native kernels.

Exits 1 if anything differs and names the first differing tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from digests import PARTS, Numbers

OLD_PLAIN = {"LOCALVIT_PLAIN": "1", "LOCALVIT_KERNELS": "torch", "LOCALVIT_LINEAR": "linear"}
NEW_PLAIN = {"LOCALVIT_KERNELS": "plain"}


def measure(part: str, checkout: Path, environment: dict[str, str]) -> Numbers:
    """Run `digests.py` in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LOCALVIT_")}
    path = {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "numbers.json"
        command = [sys.executable, str(Path(__file__).resolve().with_name("digests.py"))]
        command += [part, str(checkout.resolve()), str(out)]
        environment = {**kept, **path, **environment}
        subprocess.run(command, env=environment, cwd=temporary, check=True, stdout=subprocess.DEVNULL)
        numbers: Numbers = json.loads(out.read_text())
        return numbers


def plain_environment(checkout: Path) -> dict[str, str]:
    """Environment variables that select the plain modules in this checkout."""
    return OLD_PLAIN if (checkout / "localvit/locality/switch.py").exists() else NEW_PLAIN


def compare(part: str, old: Numbers, new: Numbers) -> tuple[list[str], list[str]]:
    """Compare a part: rows of the table, and the names of what differs or is missing."""
    rows, different = [], []
    for quantity in {**old, **new}:
        first, second = old.get(quantity, {}), new.get(quantity, {})
        names = {**first, **second}
        bad = [name for name in names if first.get(name) != second.get(name)]
        rows.append(f"| {part}: {quantity} | {len(names)} | {f'{len(bad)} differ' if bad else 'equal'} |")
        different += [f"{part}: {quantity}: {name}" for name in bad]
        if not names:
            raise RuntimeError(f"{part}: {quantity}: nothing was measured")
    return rows, different


def commit(checkout: Path) -> str:
    """Name the commit of a checkout, with a mark if files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "not in git"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout with the numbers to keep")
    parser.add_argument("new", type=Path, help="checkout to compare")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    for which in ("old", "new"):
        parser.add_argument(f"--{which}-env", nargs="*", metavar="KEY=VALUE", help="instead of plain modules")
    return parser.parse_args()


def main() -> int:
    """Compare two checkouts; 1 if anything differs."""
    asked = arguments()
    sides = {}
    for which in ("old", "new"):
        checkout, given = getattr(asked, which), getattr(asked, f"{which}_env")
        plain = plain_environment(checkout)
        sides[which] = (checkout, plain if given is None else dict(item.split("=", 1) for item in given))
    lines = ["# Numbers of two versions, bit for bit", ""]
    for which, (checkout, environment) in sides.items():
        variables = " ".join(f"`{name}={value}`" for name, value in environment.items())
        lines.append(f"- {which}: `{commit(checkout)}`, {variables or 'default environment'}")
    lines += ["", "| quantity | compared tensors and values | result |", "|---|---:|---|"]
    different: list[str] = []
    for part in asked.parts:
        old, new = (measure(part, *side) for side in sides.values())
        rows, bad = compare(part, old, new)
        lines, different = lines + rows, different + bad
        print("\n".join(rows), flush=True)
    lines += ["", f"{len(different)} differences." if different else "All equal."]
    lines += [f"- {name}" for name in different[:20]]
    text = "\n".join(lines) + "\n"
    print(text)
    if asked.out is not None:
        asked.out.write_text(text)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
