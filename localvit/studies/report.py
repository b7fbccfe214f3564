"""A study as a report: all that a reader needs to judge it, as sections of text, tables and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from localvit.locality.config import LocalityConfig
from localvit.studies import figures
from localvit.studies.checks import Facts, check_study, dead_sites
from localvit.studies.comparison import (
    ArmResult,
    Contrast,
    Findings,
    findings,
    interval,
    p_text,
    points,
    verdict,
)
from localvit.studies.folder import StudyFolder, read_besides, read_study
from localvit.studies.page import Block, Bullets, Code, Picture, Section, Table, Text, as_html, as_markdown
from localvit.studies.records import Record
from localvit.studies.statistics import Estimate
from localvit.studies.study import Run, Study
from localvit.studies.tuning import Tuning, load_tuning, tuning_table
from localvit.training import ConfigError, to_dict
from localvit.training.checkpoint import load_checkpoint
from localvit.training.output import write_atomically

TUNING = "tuning.json"
SPEED = "speed.json"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a study's folder holds, read and compared.

    Attributes:
        folder: Of the study.
        study: What was compared.
        facts: Of its arms.
        records: Of the runs that are done.
        findings: What came out.
        warnings: What makes the results doubtful.
        tuning: Of the learning rates; ``None`` if they were not tuned.
        command: That repeats it; empty if it was no command.
        speed_machine: On which inference was timed, in words; empty if it was not.
    """

    folder: Path
    study: Study
    facts: Facts
    records: dict[Run, Record]
    findings: Findings
    warnings: tuple[str, ...]
    tuning: Tuning | None
    command: str
    speed_machine: str


def read_report(folder: Path) -> Report:
    """Read a study's folder, as far as it has got; what cannot be used becomes a warning.

    Raises:
        ConfigError: if it holds no study.
    """
    study = read_study(folder)
    command, classes = read_besides(folder)
    store = StudyFolder(folder, study)
    records, wrong = store.readable()
    speed = read_speed(folder)
    return Report(
        folder=folder,
        study=study,
        facts=check_study(study, classes),
        records=records,
        findings=findings(study, records, speed.get("images_per_second")),
        warnings=(*wrong, *_mixed(records), *_missing(study, records)),
        tuning=load_tuning(folder / TUNING) if (folder / TUNING).exists() else None,
        command=command,
        speed_machine=str(speed.get("machine", "")),
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
        Section("Cost", [cost_table(report), Text(_cost_notes(report), small=True)]),
        Section("What these seeds could show", [_power_table(report)] if report.findings.contrasts else []),
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


def result_table(report: Report) -> Table:
    """An arm in each line: its metric, and its difference from its control."""
    found = report.findings
    contrasts = {contrast.arm: contrast for contrast in found.contrasts}
    head = ["", f"test {report.study.metric}, % [95 % interval]", "against", "difference", "p (corrected)"]
    return Table(
        head, [[arm.name, _score(arm), *_contrast_cells(contrasts.get(arm.name))] for arm in found.arms]
    )


def result_notes(report: Report) -> str:
    """What the columns of the main table mean."""
    return (
        "Difference: mean of the paired differences, in points, with its 95 % interval. p: paired t-test, "
        f"corrected for {len(report.findings.contrasts)} comparisons (Holm)."
    )


def verdicts(report: Report) -> list[str]:
    """A sentence or two for every comparison."""
    return [verdict(contrast, report.findings) for contrast in report.findings.contrasts]


def cost_table(report: Report) -> Table:
    """What each arm's model costs."""
    head = ["", "parameters", "MACs", "tokens", "training, images/s", "inference, images/s", "peak memory"]
    results = {arm.name: arm for arm in report.findings.arms}
    rows = []
    for name, facts in report.facts.arms.items():
        result = results.get(name)
        memory = result.peak_memory if result else None
        rows.append(
            [
                name,
                f"{result.parameters if result else facts.parameters:,}",
                giga(result.macs if result else facts.macs),
                _or_dash(facts.tokens, "{:,}"),
                _or_dash(result and result.training_speed, "{:,.0f}"),
                _or_dash(result and result.inference_speed, "{:,.0f}"),
                _or_dash(memory and memory / 1e6, "{:,.0f} MB"),
            ]
        )
    return Table(head, rows)


def differing_fields(report: Report) -> Table:
    """The fields in which each arm's configuration differs from its control's."""
    rows = [
        [name, report.study.control_of(report.study.arm(name)), path, _value(there), _value(here)]
        for name, facts in report.facts.arms.items()
        for path, (there, here) in facts.differs.items()
    ]
    return Table(["arm", "against", "field", "there", "here"], rows, words=True)


def _warnings(report: Report) -> list[Block]:
    return [Bullets(list(report.warnings), warning=True)] if report.warnings else []


def _verdicts(report: Report) -> list[Block]:
    found: list[Block] = [Text(sentence, verdict=True) for sentence in verdicts(report)]
    return found or [Text("No comparison has a run yet.", verdict=True)]


def _claim(report: Report) -> list[Block]:
    claim = report.study.claim
    if claim is None:
        return []
    contrasts = {contrast.arm: contrast for contrast in report.findings.contrasts}
    rows = []
    for arm in report.study.arms:
        expected, reported = claim.expected.get(arm.name), claim.reported.get(arm.name)
        if expected is None and reported is None:
            continue
        contrast = contrasts.get(arm.name)
        here = contrast.difference.estimate.mean if contrast and contrast.difference else None
        rows.append(
            [
                arm.name,
                f"{expected} than {report.study.control_of(arm)}" if expected else "-",
                _or_dash(reported, "{:g}"),
                _or_dash(here, "{:+.2f}"),
                (contrast.claim if contrast and contrast.claim else "not run") if expected else "-",
            ]
        )
    head = ["arm", "claimed", "published top-1, %", "difference here", "verdict"]
    source = Text(f"Source: {claim.source}. Published figures are ImageNet-1k.", small=True)
    return [Text(claim.text), Table(head, rows, words=True), source]


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


def _cost_notes(report: Report) -> str:
    text = "Training: median over the runs, loading included, with other runs beside it."
    if report.speed_machine:
        text += f" Inference: the arms in turns, {report.speed_machine}."
    return text


def _power_table(report: Report) -> Table:
    head = [
        "",
        "seeds",
        "sd of differences",
        "effect size",
        "p (t-test)",
        "p (sign flips)",
        "detectable",
        "seeds for 0.5",
    ]
    rows = []
    for contrast in report.findings.contrasts:
        found = contrast.difference
        cells = ["-"] * 5
        if found is not None:
            cells = [
                f"{found.estimate.sd:.2f}",
                _or_dash(found.effect_size, "{:+.2f}"),
                p_text(found.p_value),
                p_text(found.permutation_p),
                "-" if found.detectable is None else points(found.detectable),
            ]
        rows.append([contrast.arm, str(len(contrast.seeds)), *cells, _or_dash(contrast.seeds_needed, "{}")])
    return Table(head, rows)


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
            f"{path} {_value(old)}, here {_value(new)}" for path, (old, new) in departures.items()
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
    values = to_dict(report.study.base)
    base = yaml.safe_dump({k: v for k, v in values.items() if k not in ("seed", "output")}, sort_keys=False)
    return [*blocks, Code(base, title="What all arms share")]


def _mixed(records: Mapping[Run, Record]) -> list[str]:
    """Warnings about results that were made under different conditions."""
    values: list[tuple[str, Callable[[Record], str]]] = [
        (
            "versions",
            lambda record: ", ".join(f"{k} {v}" for k, v in record.versions.items() if k != "python"),
        ),
        ("commits", lambda record: record.commit or "none"),
        ("machines", lambda record: record.machine),
    ]
    found = []
    for what, of in values:
        different = sorted({of(record) for record in records.values()})
        if len(different) > 1:
            found.append(f"Mixed {what}: the runs were made with {' / '.join(different)}.")
    return found


def _missing(study: Study, records: Mapping[Run, Record]) -> list[str]:
    missing = [run for run in study.runs() if run not in records]
    if not missing:
        return []
    listed = ", ".join(f"{run.arm} seed {run.seed}" for run in missing[:6])
    more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
    return [f"Not complete: {len(missing)} of {len(study.runs())} runs are missing ({listed}{more})."]


def _made_with(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"{versions}, commit {record.commit[:12]}" if record.commit else versions


def read_speed(folder: Path) -> dict[str, Any]:
    """What `answer.time_arms` left in a study's folder; empty if it did not.

    Raises:
        ConfigError: if it cannot be read.
    """
    path = folder / SPEED
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    return dict(values)


def _score(arm: ArmResult) -> str:
    if arm.mean is None:
        return f"{statistics.fmean(arm.scores.values()):.2f} [one seed]"
    return _with_interval(arm.mean)


def _contrast_cells(contrast: Contrast | None) -> list[str]:
    if contrast is None:
        return ["-", "-", "-"]
    if contrast.difference is None:
        return [contrast.control, "-", "-"]
    difference = _with_interval(contrast.difference.estimate, sign=True)
    return [contrast.control, difference, p_text(contrast.p_adjusted)]


def _with_interval(value: Estimate, *, sign: bool = False) -> str:
    return f"{value.mean:{'+.2f' if sign else '.2f'}} [{interval(value, sign=sign)}]"


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def giga(macs: float) -> str:
    """``"1.25 G"``, in units of 1e6, 1e9 or 1e12 as it suits the number."""
    if macs >= 1e12:
        return f"{macs / 1e12:,.3g} T"
    return f"{macs / 1e9:.3g} G" if macs >= 1e8 else f"{macs / 1e6:.3g} M"


def _value(value: Any) -> str:
    """A field's value as a reader understands it; `{}` says little about locality."""
    if isinstance(value, Mapping) and not value:
        chosen = LocalityConfig().resolve().to_dict()
        return "the paper's: " + ", ".join(f"{name} {v}" for name, v in chosen.items())
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {v}" for name, v in value.items())
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
