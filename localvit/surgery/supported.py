"""Table of timm's architectures: accepted or refused, and why. `supported.json` is made by `make supported`."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files
from typing import Any

import timm

from localvit.cost import on_meta
from localvit.errors import UnsupportedModelError
from localvit.locality import LocalityConfig
from localvit.surgery.adapters import adapter_for, groups_of
from localvit.surgery.ffns import class_name
from localvit.surgery.preview import plan_changes
from localvit.surgery.refusals import reason_for


@dataclass(frozen=True)
class SupportEntry:
    """One architecture of timm.

    Attributes:
        architecture: Name for `timm.create_model`.
        model: Class; for refused models without building them, the module of timm.
        accepted: True if `localvit.localize` accepts it.
        ffns: Number of FFNs; 0 if it is refused.
        note: Note of the plan, or the reason for the refusal.
    """

    architecture: str
    model: str
    accepted: bool
    ffns: int
    note: str


def supported(pattern: str = "*") -> list[SupportEntry]:
    """Read the shipped table; `pattern` selects architectures, as in `timm.list_models`."""
    stored = json.loads((files("localvit.surgery") / "supported.json").read_text())
    entries = [
        SupportEntry(name, group["model"], group["accepted"], ffns, group["note"])
        for group in stored["groups"]
        for name, ffns in group["architectures"].items()
    ]
    return sorted((e for e in entries if fnmatch(e.architecture, pattern)), key=lambda e: e.architecture)


def scan(names: Iterable[str]) -> list[SupportEntry]:
    """Compute the entries of architectures; each is built on the meta device.

    Tokens are compared with grids, by a forward pass on the meta device, for one architecture of each structure
    (classes of model, embedding, blocks and FFNs).
    """
    seen: set[Any] = set()
    return [_scan(name, seen) for name in names]


def _scan(name: str, seen: set[Any]) -> SupportEntry:
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    reason = reason_for(module)
    if reason is not None:
        return SupportEntry(name, module, False, 0, reason)
    model = on_meta(lambda: timm.create_model(name))
    kind = type(model).__name__
    try:
        adapter = adapter_for(model)
        groups = groups_of(model, adapter)
        structure = (kind, tuple(sorted({class_name(type(m)) for m in model.modules()})))
        config = LocalityConfig(init="preserve")
        plan, _ = plan_changes(model, config, "all", None, count=structure not in seen)
        seen.add(structure)
    except UnsupportedModelError as error:
        return SupportEntry(name, kind, False, 0, str(error))
    return SupportEntry(name, kind, True, sum(map(len, groups.values())), "; ".join(plan.notes))


def table_of(entries: Iterable[SupportEntry]) -> str:
    """Return the JSON text of a table: entries with one class and one note are a group."""
    groups: dict[tuple[str, bool, str], dict[str, int]] = {}
    for entry in entries:
        groups.setdefault((entry.model, entry.accepted, entry.note), {})[entry.architecture] = entry.ffns
    listed = [
        {"model": model, "accepted": accepted, "note": note, "architectures": names}
        for (model, accepted, note), names in sorted(groups.items())
    ]
    return json.dumps({"timm": timm.__version__, "groups": listed}, indent=1) + "\n"


def document_of(entries: Iterable[SupportEntry]) -> str:
    """Return the Markdown text of a table, by class."""
    groups: dict[tuple[bool, str, str], list[SupportEntry]] = {}
    for entry in entries:
        groups.setdefault((not entry.accepted, entry.model, entry.note), []).append(entry)
    lines = ["| class | architectures | for example | |", "|---|---|---|---|"]
    for (refused, model, note), listed in sorted(groups.items()):
        text = f"refused: {note}" if refused else note or "accepted"
        lines.append(f"| `{model}` | {len(listed)} | `{listed[0].architecture}` | {text} |")
    return "\n".join(lines) + "\n"
