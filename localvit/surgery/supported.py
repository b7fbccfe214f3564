"""Table of timm's architectures: accepted or refused, and why (`supported.json`, by `make supported`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files

import timm

from localvit.cost import on_meta
from localvit.errors import UnsupportedModelError
from localvit.locality import LocalityConfig
from localvit.structure import build, parse_json, to_json
from localvit.surgery.preview import plan_changes
from localvit.surgery.refusals import REASONS


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


@dataclass(frozen=True)
class _Group:
    """Entries of the file with one class and one note: name of an architecture -> its number of FFNs."""

    model: str
    accepted: bool
    note: str
    architectures: dict[str, int]


@dataclass(frozen=True)
class _Table:
    """The file: groups of entries, and the version of timm."""

    timm: str
    groups: tuple[_Group, ...]


def supported_models(pattern: str = "*") -> list[SupportEntry]:
    """Read the shipped table; `pattern` selects architectures, as in `timm.list_models`."""
    text = (files("localvit.surgery") / "supported.json").read_text(encoding="utf-8")
    entries = [
        SupportEntry(name, group.model, group.accepted, ffns, group.note)
        for group in build(_Table, parse_json(text, "supported.json")).groups
        for name, ffns in group.architectures.items()
    ]
    return sorted((e for e in entries if fnmatch(e.architecture, pattern)), key=lambda e: e.architecture)


def timm_architectures() -> list[str]:
    """Return the names of timm's own architectures."""
    names = timm.list_models()
    return [n for n in names if timm.models.model_entrypoint(n).__module__.startswith("timm.models.")]


def scan_supported(names: Iterable[str]) -> list[SupportEntry]:
    """Compute the entries of architectures; those whose module is not refused are built on the meta device.

    Classes of models, blocks and FFNs are compared with the adapters (`plan` also compares the tokens).
    """
    return [_scan(name) for name in names]


def _scan(name: str) -> SupportEntry:
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if module in REASONS:
        return SupportEntry(name, module, False, 0, REASONS[module])
    model = on_meta(lambda: timm.create_model(name))
    kind = type(model).__name__
    try:
        plan, changes = plan_changes(model, LocalityConfig(init="preserve"), "all", None, count=False)
    except UnsupportedModelError as error:
        return SupportEntry(name, kind, False, 0, str(error))
    return SupportEntry(name, kind, True, len(changes), "; ".join(plan.notes))


def supported_table(entries: Iterable[SupportEntry]) -> str:
    """Return the JSON text of a table."""
    return to_json(_Table(timm.__version__, _groups(entries)))


def supported_document(entries: Iterable[SupportEntry]) -> str:
    """Return the Markdown text of a table, by class."""
    lines = ["| class | architectures | for example | |", "|---|---|---|---|"]
    for group in sorted(_groups(entries), key=lambda group: not group.accepted):
        text = group.note if group.accepted else f"refused: {group.note}"
        example, count = next(iter(group.architectures)), len(group.architectures)
        lines.append(f"| `{group.model}` | {count} | `{example}` | {text or 'accepted'} |")
    return "\n".join(lines) + "\n"


def _groups(entries: Iterable[SupportEntry]) -> tuple[_Group, ...]:
    groups: dict[tuple[str, bool, str], dict[str, int]] = {}
    for entry in entries:
        groups.setdefault((entry.model, entry.accepted, entry.note), {})[entry.architecture] = entry.ffns
    return tuple(_Group(*kind, names) for kind, names in sorted(groups.items()))
