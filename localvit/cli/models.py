"""`localvit models`: names, cost, published accuracy and confounders."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from localvit.cli.arguments import UsageError

if TYPE_CHECKING:
    from localvit.models import ModelCard, ModelEntry


@dataclass(frozen=True, kw_only=True)
class Options:
    """List the models with locality and their baselines, or show the card of one.

    Example: localvit models localvit_tiny_patch16_224
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    """model whose card is shown; with --supported, a pattern such as 'swin*'"""
    supported: tyro.conf.FlagCreatePairsOff[bool] = False
    """list the timm architectures that localvit.localize accepts, and why it refuses the others"""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """count again, and compare with the table that comes with localvit"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """print JSON"""


def run(options: Options) -> int:
    """Print a table or a card; return 0, with `check` 1 for a difference."""
    if options.supported:
        return _supported(options)
    from localvit.models import registry

    cards = list(registry().values()) if options.name is None else [_known(options.name)]
    if options.check:
        return _check(cards)
    if options.json:
        shown: object = [dataclasses.asdict(card.entry) for card in cards]
        print(json.dumps(shown if options.name is None else dataclasses.asdict(cards[0]), indent=2))
    elif options.name is None:
        _print_table([card.entry for card in cards])
    else:
        print("\n".join(_card(cards[0])))
    return 0


def _check(cards: Sequence[ModelCard]) -> int:
    """Count models again; return 1 if one differs from its card."""
    from localvit.models import count

    return _print_changes(card.entry.name for card in cards if count(card.entry.name) != card)


def _print_changes(changed: Iterable[str]) -> int:
    lines = [f"{name}: the table that comes with localvit differs" for name in changed]
    print("\n".join(lines) or "no difference")
    return int(bool(lines))


def _supported(options: Options) -> int:
    from localvit.structure import to_json
    from localvit.surgery import scan_supported, supported_document, supported_models, timm_architectures

    pattern = options.name or "*"
    entries = supported_models(pattern)
    if not entries:
        raise UsageError(f"no timm architecture matches {pattern!r}; use a pattern such as 'swin*'")
    if options.check:
        chosen = {entry.architecture for entry in entries}
        again = scan_supported(n for n in timm_architectures() if n in chosen or options.name is None)
        return _print_changes(sorted({e.architecture for e in set(entries) ^ set(again)}))
    if options.json:
        print(to_json(entries), end="")
    elif options.name is None:
        print(supported_document(entries), end="")
    else:
        for entry in entries:
            state = f"{entry.ffns} FFNs" if entry.accepted else "refused"
            print(
                f"{entry.architecture} ({entry.model}): {state}" + (f"; {entry.note}" if entry.note else "")
            )
    return 0


def _known(name: str) -> ModelCard:
    from localvit.models import registry

    cards = registry()
    if name in cards:
        return cards[name]
    near = difflib.get_close_matches(name, cards, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`localvit models` lists the names"
    raise UsageError(
        f"the model {name!r} is not in the table of localvit's own models; {hint} (--supported: all of timm)"
    )


def _print_table(entries: Sequence[ModelEntry]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    sources = dict.fromkeys(entry.source for entry in entries if entry.source)
    table = Table(
        title="Parameters and multiply-accumulates measured, ImageNet-1k accuracy (%) as published",
        caption=f"Accuracy from {', '.join(sources)} (GitHub). localvit models NAME shows a card.",
        box=box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("name", no_wrap=True)
    for column in ("Mparams", "GMACs", "top-1", "top-5"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.parameters / 1e6:.2f}",
            f"{entry.gmacs:.3f}",
            "-" if entry.top1 is None else f"{entry.top1:.2f}",
            "-" if entry.top5 is None else f"{entry.top5:.2f}",
        )
    Console().print(table)


def _card(card: ModelCard) -> Iterator[str]:
    yield card.entry.name
    yield from _lines(card.entry)
    if card.base is None:
        return
    yield f"  made from       {card.base.name} by localvit.localize"
    yield f"  locality        {_settings(card.entry.locality or {})}"
    for group, values in card.entry.also.items():
        yield f"    {group}: {_settings(values)}"
    if card.entry.args:
        yield f"  arguments       {_settings(card.entry.args)}"
    if card.dead_parameters:
        yield f"  dead            {card.dead_parameters:,} parameters that no output depends on"
    if card.matched:
        yield f"  matched         {card.matched}: heads, pre-norm, drop-path, class token as in the control"
    yield "baseline"
    yield f"  {card.base.name}"
    yield from _lines(card.base)
    yield "differences other than the depth-wise convolution"
    yield from (f"  - {sentence}" for sentence in card.confounders)
    yield from (f"note: {note}" for note in card.notes)


def _lines(entry: ModelEntry) -> Iterator[str]:
    _, height, width = entry.input_size
    yield f"  cost            {entry.parameters:,} parameters, {entry.gmacs:.4f} GMACs at {height} x {width}"
    if entry.top1 is None:
        yield "  published       no accuracy"
    else:
        top5 = "" if entry.top5 is None else f", top-5 {entry.top5:g} %"
        yield f"  published       ImageNet top-1 {entry.top1:g} %{top5} ({entry.source}); not repeated here"
    yield f"  weights         {entry.weights or 'none published'}"


def _settings(values: object) -> str:
    return json.dumps(values)
