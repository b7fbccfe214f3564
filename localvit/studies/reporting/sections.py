"""A report as sections of text, tables and pictures, from what matters to what it takes to repeat it."""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
import yaml

from localvit.atomic import write_atomically
from localvit.inference import load_checkpoint
from localvit.structure import plain
from localvit.studies.design import Study, dead_sites
from localvit.studies.execution import Record, StudyFolder, Tuning, tuning_table
from localvit.studies.reporting import figures
from localvit.studies.reporting.comparison import verdict
from localvit.studies.reporting.page import (
    Block,
    Bullets,
    Code,
    Picture,
    Section,
    Table,
    Text,
    as_html,
    as_markdown,
)
from localvit.studies.reporting.report import Report
from localvit.studies.reporting.tables import (
    claim_table,
    cost_notes,
    cost_table,
    differing_fields,
    field_value,
    power_table,
    result_notes,
    result_table,
)


def write_report(report: Report) -> None:
    """Write `report.html`, `report.md` and `summary.json` into the study's folder."""
    summary: dict[str, Any] = {
        **report.findings.to_dict(),
        "study": report.study.to_dict(),
        "confounders": {name: list(arm.confounders) for name, arm in report.facts.arms.items()},
        "warnings": list(report.warnings),
        "command": report.command,
    }
    parts = sections(report)
    write_atomically(report.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(report.folder / "report.md", as_markdown(report.study.question, parts))
    write_atomically(report.folder / "report.html", as_html(report.study.question, parts))


def sections(report: Report) -> list[Section]:
    """The report, from what matters to what it takes to repeat it."""
    parts = [
        Section("", [Text(setting(report), small=True), *_warnings(report), *_verdicts(report)]),
        Section("Result", [result_table(report), Text(result_notes(report), small=True)]),
        Section("The paper's claim", _claim(report)),
        Section("Pictures", _pictures(report)),
        Section("How the arms differ", _differences(report)),
        Section("Cost", [cost_table(report), Text(cost_notes(report), small=True)]),
        Section("What these seeds could show", [power_table(report)] if report.findings.contrasts else []),
        Section("Learning rates", _learning_rates(report)),
        Section("To repeat it", _repeat(report)),
    ]
    return [part for part in parts if part.blocks]


def setting(report: Report) -> str:
    """What was trained on what, in a line."""
    study, base = report.study, report.study.base
    sizes = ", ".join(f"{name} {value}" for name, value in base.model.args.items())
    images = report.findings.test_images
    return (
        f"{base.model.name}{f' ({sizes})' if sizes else ''} on {base.data.train}; {base.epochs} epochs; "
        f"{len(study.seeds)} paired seeds, each fixing split, order and the initial values of shared weights"
        + (f"; {images:,} test images." if images else ".")
    )


def verdicts(report: Report) -> list[str]:
    """A sentence or two for every comparison."""
    return [verdict(contrast, report.findings) for contrast in report.findings.contrasts]


def _warnings(report: Report) -> list[Block]:
    return [Bullets(list(report.warnings), warning=True)] if report.warnings else []


def _verdicts(report: Report) -> list[Block]:
    found: list[Block] = [Text(sentence, verdict=True) for sentence in verdicts(report)]
    return found or [Text("No comparison has a run yet.", verdict=True)]


def _claim(report: Report) -> list[Block]:
    claim = report.study.claim
    if claim is None:
        return []
    source = Text(f"Source: {claim.source}. Published figures are ImageNet-1k.", small=True)
    return [Text(claim.text), claim_table(report, claim), source]


def _pictures(report: Report) -> list[Block]:
    found, arms = report.findings, report.study.arms
    if not found.arms:
        return []
    by_arm = {
        arm.name: runs
        for arm in arms
        if (runs := [record for run, record in report.records.items() if run.arm == arm.name])
    }
    pictures: list[Block] = []
    if any(contrast.difference for contrast in found.contrasts):
        caption = "Differences with 95 % intervals; filled: shown after correction. Ticks: each seed."
        pictures.append(Picture(figures.forest(found), "Forest plot", caption))
    caption = "Validation top-1 by epoch: mean over the seeds; the band is lowest to highest."
    pictures.append(Picture(figures.learning_curves(by_arm), "Learning curves", caption))
    costs: list[tuple[Literal["macs", "parameters", "inference_speed"], str]] = [
        ("macs", "multiply-accumulates for one image"),
        ("parameters", "parameters"),
    ]
    if any(arm.inference_speed for arm in found.arms):
        costs.append(("inference_speed", "inference, images per second"))
    for cost, label in costs:
        caption = f"Test {report.study.metric} with 95 % interval against {label}."
        pictures.append(Picture(figures.against_cost(found, cost, label), f"Score against {label}", caption))
    return pictures + _kernels(report)


def _kernels(report: Report) -> list[Block]:
    """Of the first arm that has any, of its first seed, where its weights are at hand."""
    store = StudyFolder(report.folder, report.study)
    for run in report.records:
        locality = run.config.model.locality
        if locality is None or not locality.depthwise or not (store.of(run) / "best").exists():
            continue
        dead = dead_sites(run.config, report.facts.classes)
        model = load_checkpoint(str(store.of(run)), torch.device("cpu")).model
        drawn = figures.kernels(model, skip=dead)
        words = (
            f"learned by {run.arm}, seed {run.seed}: the 48 of largest norm, each scaled to its largest "
            "weight (red positive, blue negative)"
        )
        if drawn:
            left_out = f" {', '.join(dead)} is left out: no output depends on it." if dead else ""
            return [
                Picture(picture, f"Kernels of {path}", f"Depth-wise kernels of {path} {words}.{left_out}")
                for path, picture in drawn.items()
            ]
    return []


def _differences(report: Report) -> list[Block]:
    blocks: list[Block] = [differing_fields(report)]
    matched = [facts.matched for facts in report.facts.arms.values() if facts.matched]
    if matched:
        asked = f"Budgets: match {report.study.match}, {report.study.budget}."
        blocks += [Text(asked), Bullets(matched)]
    for name, facts in report.facts.arms.items():
        if facts.confounders:
            blocks += [Text(f"Along with these fields, {name} differs in:"), Bullets(list(facts.confounders))]
    return blocks


def _learning_rates(report: Report) -> list[Block]:
    if report.tuning is None:
        rates = {run.config.optim.lr for run in report.study.runs()}
        if len(rates) > 1:
            return []
        return [
            Text(f"Not tuned: every arm trains with {rates.pop():g}, which may suit some of them better.")
        ]
    return [Text(tuning_text(report.tuning, report.study)), Table(*tuning_table(report.tuning))]


def tuning_text(tuning: Tuning, study: Study) -> str:
    """Where the learning rates are from, and how far that carries."""
    text = (
        "Each arm's was chosen by mean validation top-1 (the test split was not used) from one grid, "
        f"with seeds {', '.join(map(str, tuning.seeds))}: {tuning.command}. Chosen rates are "
        "marked with *; in brackets each seed's value."
    )
    if tuning.at_border:
        text += f" The grid ended at the best value of {', '.join(tuning.at_border)}."
    departures = tuning.departures(study.base)
    if departures:
        listed = "; ".join(
            f"{path} {field_value(old)}, here {field_value(new)}" for path, (old, new) in departures.items()
        )
        text += f" They were tuned for another setting: {listed}."
    return text


def _repeat(report: Report) -> list[Block]:
    records = list(report.records.values())
    seeds = ", ".join(map(str, report.study.seeds))
    blocks: list[Block] = [Code(report.command)] if report.command else []
    blocks.append(
        Text(f"Seeds {seeds}. {len(records)} of {len(report.study.runs())} runs are done.", small=True)
    )
    if records:
        made = " / ".join(sorted({_made_with(record) for record in records}))
        machines = "; ".join(sorted({record.machine for record in records}))
        notes = "; ".join(records[0].notes) or "as the data brings them"
        hours = sum(record.seconds for record in records) / 3600
        words = f"Made with {made}. Trained on: {machines}; {hours:.2f} hours of training in all."
        blocks += [Text(words, small=True), Text(f"Splits of the first run: {notes}.", small=True)]
    values = plain(report.study.base)
    base = yaml.safe_dump({k: v for k, v in values.items() if k not in ("seed", "output")}, sort_keys=False)
    return [*blocks, Code(base, title="What all arms share")]


def _made_with(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"{versions}, commit {record.commit[:12]}" if record.commit else versions
