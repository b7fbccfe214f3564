"""Time two checkouts in two processes that take turns, and LocalViT beside DeiT in each.

    git worktree add ../before v0.3.2
    python benchmarks/old_new.py ../before . --rounds 12 --output benchmarks/results

One thread. Written are old_new_<machine>_<date>.{md,json}: medians of ratios with quartiles, and what a
training step keeps for its backward pass. Memory differs between processes, and times with it: --processes 12
gives the quartiles of the medians of 12 pairs of processes.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[], object]
TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 4}
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
OURS, BASE = "localvit_tiny_patch16_224", "deit_tiny_patch16_224"
# Name of a workload -> batch size, calls at a time. "training" and "eager" are of the models, the others
# fused.
WORKLOADS: dict[str, tuple[str, int, int]] = {
    "training step B16": ("training", 16, 1),
    "fused B1": ("fused", 1, 8),
    "fused B8": ("fused", 8, 2),
    "tiny eager B1": ("tiny eager", 1, 100),
    "tiny eager B64": ("tiny eager", 64, 30),
    "tiny fused B64": ("tiny fused", 64, 30),
    "tiny training step B32": ("tiny training", 32, 20),
    "small training step B128": ("small training", 128, 1),
}


def model_of(kind: str, local: bool) -> Any:
    """Build one of the models: LocalViT-T or DeiT-T, or a shrunk one."""
    import timm

    import localvit

    sizes = {"tiny": TINY | {"num_classes": 10}, "small": SMALL | {"num_classes": 10}}
    size = sizes.get(kind.partition(" ")[0])
    if size is None:
        return timm.create_model(OURS if local else BASE)
    model = timm.create_model(BASE, **size)
    if local:
        localvit.localize(model, localvit.LocalityConfig(), count_macs=False)
    return model


def work_of(kind: str, batch: int, local: bool) -> Work:
    """Return one call of a workload."""
    import torch

    import localvit

    torch.manual_seed(0)
    model = model_of(kind, local)
    size = TINY if "tiny" in kind else SMALL if "small" in kind else {"img_size": 224}
    side = int(size["img_size"])
    images = torch.randn(batch, int(size.get("in_chans", 3)), side, side)
    if "training" not in kind:
        model = localvit.fuse(model.eval()) if "fused" in kind else model.eval()

        def infer() -> object:
            with torch.inference_mode():
                return model(images)

        return infer
    optimizer = torch.optim.AdamW(model.train().parameters())
    labels = torch.arange(batch) % 10

    def train() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def kept_bytes(model: Any, batch: int = 16) -> int:
    """Return what the forward pass of a training step keeps, in bytes: the distinct storages that autograd
    saves, and those of tensors that live on (selective checkpointing keeps its own outside of autograd)."""
    import torch

    images = torch.randn(batch, 3, 224, 224)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
    found: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(images).sum()
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and id(thing) not in before:
            note(thing)
    loss.backward()
    return sum(found.values())


def kept_for_backward(designs: bool) -> dict[str, float]:
    """Return what a training step keeps as a fraction of DeiT-T's, by default and with selective
    checkpointing."""
    import localvit

    base = kept_bytes(model_of("", False))
    found = {"LocalViT-T, default": kept_bytes(model_of("", True)) / base}
    if not designs:
        return found
    os.environ["LOCALVIT_KERNELS"] = "plain"
    for name, config in all_designs().items():
        model = model_of("", False)
        localvit.localize(model, config, count_macs=False)
        for selective in (False, True):
            localvit.set_selective_checkpointing(model, selective)
            found[f"{name}, {'selective' if selective else 'plain'}"] = kept_bytes(model) / base
    return found


def all_designs() -> dict[str, Any]:
    """Return 17 designs: the published ones, and one for each further branch of the block."""
    import localvit
    from localvit import LocalityConfig

    return {
        **localvit.PRESETS,
        "ECA": LocalityConfig(gate="eca"),
        "no gate": LocalityConfig(gate="none"),
        "layer norms": LocalityConfig(norm="layer"),
        "position first": LocalityConfig(position="first"),
        "no convolution": LocalityConfig(depthwise=False),
        "SiLU, inner skip": LocalityConfig(activation="silu", inner_skip=True),
        "prefix tokens ride along": LocalityConfig(prefix="pointwise"),
    }


def serve() -> None:
    """Answer requests of the parent, a line of JSON each."""
    import torch

    torch.set_num_threads(1)
    works: dict[tuple[str, bool], Work] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "kept" in request:
            print(json.dumps(kept_for_backward(request["kept"])), flush=True)
            continue
        name, local = request["work"], request["local"]
        kind, batch, calls = WORKLOADS[name]
        if (name, local) not in works:
            works[name, local] = work_of(kind, batch, local)
            for _ in range(4):
                works[name, local]()
        start = time.perf_counter()
        for _ in range(calls):
            works[name, local]()
        print(json.dumps((time.perf_counter() - start) / calls), flush=True)


class Side:
    """A process that measures one checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
        environment.pop("LOCALVIT_KERNELS", None)
        command = [sys.executable, __file__, "--serve"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True, cwd="/")

    def ask(self, **request: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def quartiles(values: list[float]) -> str:
    """Format the median and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


# Column of the table -> the two measurements that it divides: (checkout, with locality).
COLUMNS = {
    "new / old": (("new", True), ("old", True)),
    "old / plain DeiT": (("old", True), ("old", False)),
    "new / plain DeiT": (("new", True), ("new", False)),
}


def ratios(sides: dict[str, Side], rounds: int, name: str) -> dict[str, list[float]]:
    """Return the ratio of each round, for each column."""
    seconds: dict[tuple[str, bool], list[float]] = {}
    for i in range(rounds + 1):
        for label in list(sides) if i % 2 else list(sides)[::-1]:
            for local in (True, False):
                took = sides[label].ask(work=name, local=local)
                if i:  # the first round warms up
                    seconds.setdefault((label, local), []).append(took)
    return {
        column: [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        for column, (a, b) in COLUMNS.items()
    }


def measure(start: Callable[[], dict[str, Side]], processes: int, rounds: int, name: str) -> dict[str, str]:
    """Return the row of a workload: quartiles over rounds, or over the medians of several processes."""
    found: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for _ in range(processes):
        sides = start()
        for column, values in ratios(sides, rounds, name).items():
            found[column] += values if processes == 1 else [statistics.median(values)]
        for side in sides.values():
            side.close()
    row = {"workload": name} | {column: quartiles(values) for column, values in found.items()}
    print("  ".join(row.values()), flush=True)
    return row


def table(rows: list[dict[str, str]]) -> str:
    """Format rows as Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, help="OLD NEW")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1, help="pairs of processes for each workload")
    parser.add_argument("--only", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()

    def start() -> dict[str, Side]:
        return {label: Side(path) for label, path in zip(("old", "new"), arguments.checkouts, strict=True)}

    rows = [measure(start, arguments.processes, arguments.rounds, name) for name in arguments.only]
    kept: dict[str, dict[str, float]] = {}
    if not arguments.no_memory:
        old, new = start().values()
        kept = {"old": old.ask(kept=False), "new": new.ask(kept=True)}
        found = [
            {"design": f"{s}: {n}", "kept / DeiT-T": f"{v:.3f}"} for s in kept for n, v in kept[s].items()
        ]
        print(table(found))
    if arguments.output:
        save(arguments.output, rows, kept, arguments.processes)


def save(folder: Path, rows: list[dict[str, str]], kept: dict[str, dict[str, float]], processes: int) -> None:
    """Write both tables."""
    import torch
    from writing import write

    from localvit.bench.result import Setting

    torch.set_num_threads(1)
    setting = Setting.here(torch.device("cpu"))
    memory = [{"design": n, "old": "", "new": f"{v:.3f}"} for n, v in kept.get("new", {}).items()]
    for line in memory:
        line["old"] = f"{kept['old'][line['design']]:.3f}" if line["design"] in kept["old"] else ""
    about = (
        f"# Old and new, timed alternately\n\n{setting}.\n\nTimes, one thread, medians [quartiles] of ratios"
        f"{f', each the median of one of {processes} pairs of processes' if processes > 1 else ''}."
        " Table of designs: what the forward pass of a training step keeps, by DeiT-T's, batch 16.\n"
    )
    if memory:
        about += "\n" + table(memory) + "\n"
    hardware = setting.machine.removesuffix(", 1 thread")
    write(
        folder, "old_new", hardware, about, list(rows[0]), [list(r.values()) for r in rows], rows, kept=kept
    )  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
