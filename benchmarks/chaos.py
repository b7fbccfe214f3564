"""Is anything lost? A run is killed with SIGKILL at random moments and resumed, again and again.

    python benchmarks/chaos.py              # 100 kills; writes benchmarks/results/chaos_<date>.md
    python benchmarks/chaos.py --kills 5

A run has everything random in it (mixup, cutmix, drop-path, dropout), two data workers, batch norm and an
averaged model. It must end as a run that nobody killed: the same weights of both saved models, bit for bit,
and the same numbers except times. Exit code 1 if anything differs.
"""

import argparse
import datetime
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localvit.bench.host import machine
from localvit.runtime.software import versions

SETTINGS = [
    *("model.args.embed_dim=24", "model.args.depth=2", "model.args.num_heads=2", "model.locality={}"),
    *("model.args.drop_path_rate=0.2", "model.args.proj_drop_rate=0.1", "augment.mixup=0.8"),
    *("augment.cutmix=1.0", "ema_decay=0.95", "epochs=12", "schedule.warmup_epochs=2", "batch_size=64"),
    *("workers=2", "save_seconds=0.5", "device=cpu"),
]
MOMENTS = {"during start-up": 0.15, "before its first save": 0.25, "after a save": 0.6}
"""Moments of a kill, and their probabilities."""


@dataclass
class Kill:
    """One kill, the files after it, and the step from which the next process resumed."""

    run: int
    moment: str
    epochs_done: int
    newest_state: int
    half_written: int
    resumed_after: int | None = None


class Process:
    """Process that trains in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.had = newest_state(folder), begun(folder)
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        command = [sys.executable, "-m", "localvit", "train", "--recipe", "digits", *settings]
        self.popen = subprocess.Popen(
            [*command, "--output", str(folder)],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, seconds: float = 1e9, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for whichever comes first; return whether the process is still alive."""
        end = time.monotonic() + seconds
        while self.popen.poll() is None and time.monotonic() < end and not until():
            time.sleep(0.002)
        return self.popen.poll() is None

    def wait_for(self, moment: str, dice: random.Random) -> bool:
        """Wait for a random instant of that kind; return whether the process is still alive."""
        if moment == "during start-up":
            return self.wait(dice.uniform(0.0, 4.0))
        if moment == "before its first save":
            self.wait(until=lambda: begun(self.folder) != self.had[1])
            return self.wait(dice.uniform(0.0, 0.5))
        self.wait(until=lambda: newest_state(self.folder) != self.had[0])
        return self.wait(dice.uniform(0.0, 1.5))

    def kill(self) -> str:
        """Kill it; return what it had printed."""
        self.popen.kill()
        return self.popen.communicate()[0]


def newest_state(folder: Path) -> int:
    """Return the step of the newest state; 0 if there is none."""
    names = sorted(path.stem for path in (folder / "state").glob("*.state"))
    return int(names[-1].removeprefix("step-")) if names else 0


def begun(folder: Path) -> float:
    """Return the time when a process last began: it writes the configuration first."""
    try:
        return (folder / "config.yaml").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def look(folder: Path, run: int, moment: str) -> Kill:
    """Describe what a killed process left."""
    status = folder / "status.json"
    done = json.loads(status.read_text())["epochs_done"] if status.exists() else 0
    rest = list(folder.rglob(".*-*"))
    return Kill(run, moment, done, newest_state(folder), len(rest))


def story(folder: Path) -> dict[str, Any]:
    """Read everything that must not depend on the kills."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    status = json.loads((folder / "status.json").read_text())
    for timed in (*lines, status["test"], status["best"]["validation"]):
        timed.pop("images_per_second")
        timed.pop("seconds", None)
        timed.pop("data_wait", None)
    weights = {name: (folder / name / "model.safetensors").read_bytes() for name in ("best", "last")}
    return {"metrics": lines, "test": status["test"], "best": status["best"], "weights": weights}


def killed_run(folder: Path, number: int, most: int, dice: random.Random) -> list[Kill]:
    """Train in `folder` to the end, killed up to `most` times on the way."""
    kills: list[Kill] = []
    while True:
        process = Process(folder)
        moment = dice.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        alive = process.wait_for(moment, dice) if len(kills) < most else process.wait()
        said = process.kill() if alive else process.popen.communicate()[0]
        if kills and begun(folder) != process.had[1]:
            found = re.search(r"resuming after step (\d+)", said)
            kills[-1].resumed_after = int(found[1]) if found else 0
        if not alive:
            if process.popen.returncode:
                raise SystemExit(f"run {number} ended with {process.popen.returncode}:\n{said}")
            return kills
        kills.append(look(folder, number, moment))
        print(f"run {number}, kill {len(kills)}: {kills[-1]}", flush=True)


def report(kills: list[Kill], same: list[bool], epochs: int, seconds: float) -> str:
    """Write the results in Markdown."""
    moments = Counter(kill.moment for kill in kills)
    told = [kill for kill in kills if kill.resumed_after is not None]
    right = sum(kill.resumed_after == kill.newest_state for kill in told)
    listed = ", ".join(f"{count} {moment}" for moment, count in moments.items())
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    half = sum(kill.half_written > 0 for kill in kills)
    lines = [
        "# Killed and resumed",
        "",
        f"{len(kills)} times SIGKILL ({listed}), spread over {len(same)} runs of {epochs} epochs, in "
        f"{seconds:.0f} s.",
        f"{machine(1)}; {installed}.",
        "",
        f"- Runs that ended with the weights, metrics and choices of the run that nobody killed, bit for "
        f"bit: **{sum(same)} of {len(same)}**.",
        f"- Kills after which the next process that lived long enough resumed from the newest state on the "
        f"disk: **{right} of {len(told)}**.",
        f"- Kills that left a half-written file (removed by the next process): {half}.",
        "",
        "Settings: " + ", ".join(f"`{setting}`" for setting in SETTINGS) + ".",
        "",
        "| kill | run | moment | epochs done | newest state (step) | resumed after step |",
        "|---|---|---|---|---|---|",
    ]
    for number, kill in enumerate(kills, start=1):
        resumed = (
            "killed before" if kill.resumed_after is None else kill.resumed_after or "none: from the start"
        )
        lines.append(
            f"| {number} | {kill.run} | {kill.moment} | {kill.epochs_done} | {kill.newest_state or 'none'} | "
            f"{resumed} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Kill until there are enough kills, finish, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-run", type=int, default=12, help="most kills of one run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    dice, begin = random.Random(args.seed), time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        killed_run(work / "whole", 0, 0, dice)
        expected = story(work / "whole")
        kills: list[Kill] = []
        same: list[bool] = []
        while len(kills) < args.kills:
            folder = work / f"run-{len(same) + 1}"
            kills += killed_run(folder, len(same) + 1, min(args.per_run, args.kills - len(kills)), dice)
            same.append(story(folder) == expected)
            print(f"run {len(same)} is {'the same' if same[-1] else 'ANOTHER'}", flush=True)
        text = report(kills, same, len(expected["metrics"]), time.monotonic() - begin)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(text)
    args.output.mkdir(exist_ok=True)
    (args.output / f"chaos_{datetime.date.today()}.md").write_text(text)
    wrong = any(kill.resumed_after not in (kill.newest_state, None) for kill in kills)
    raise SystemExit(0 if all(same) and not wrong else 1)


if __name__ == "__main__":
    main()
