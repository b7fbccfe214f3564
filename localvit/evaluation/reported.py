"""Images that a result is reported on: the run's test split, or others that it was not trained on."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from localvit.data import (
    DataConfig,
    DataError,
    Manifest,
    Part,
    Splits,
    equal_contents,
    file_reader,
    image_name,
    make_manifest,
    open_splits,
    open_test_split,
    shared,
    split_record,
)
from localvit.errors import ConfigError
from localvit.evaluation.labels import label_by_outputs
from localvit.inference import OpenModel
from localvit.runs import SavedRun, read_run
from localvit.runtime import World


def open_equal_splits(config: DataConfig, seed: int, world: World) -> tuple[Splits, Manifest]:
    """Open the splits of a run in each of its processes.

    Raises:
        DataError: as `open_splits`; if the processes have different images.
    """
    splits = open_splits(config, seed=seed)
    manifest = make_manifest(splits, config)
    _check_equal(manifest.fingerprint(), world)
    if world.is_main_process:
        parts = {"train": splits.train, "test": splits.test, "validation": splits.validation}
        splits = replace(splits, notes=(*splits.notes, *equal_contents(parts)))
    return splits, manifest


def _check_equal(fingerprint: str, world: World) -> None:
    found = world.distinct(fingerprint)
    if len(found) > 1:
        raise DataError(
            f"the processes have different images: {found[0]!r} and {found[1]!r}; "
            "give all machines the same data"
        )


def reported_images(
    model: OpenModel,
    data: str | None,
    config: DataConfig,
    class_map: str | None,
    *,
    world: World,
    allow_change: Collection[str] = (),
) -> tuple[str, Part, tuple[str, ...]]:
    """Return the images to report a result on.

    Args:
        model, data, class_map, allow_change: As `evaluate`.
        config: Settings of `data`, and `allow_overlap`.
        world: The processes, which must have the same images.

    Returns:
        Their source; the images, labelled by the model's outputs; and sentences for the reader of the result:
        what was allowed, what could not be compared.

    Raises:
        ConfigError: if there are no such images, the run was trained on some of them, or they have changed.
        DataError: if the source cannot be used or its classes are not the model's.
    """
    saved = _saved_run(model)
    if data is not None:
        images = label_by_outputs(open_test_split(data, config), data, model, class_map)
        reader = file_reader(images.images)
        notes = [*reader.notes] if reader else []
        notes += _compare_with_training(images, data, model, saved, config, world) if saved else []
    elif saved is None:
        raise ConfigError(f"data=None: {model.source!r} is not a run's folder; name a data source")
    elif class_map is not None:
        raise ConfigError(f"class_map={class_map!r} needs data of another source; name a data source")
    else:
        data, images, notes = _own_test_split(model, saved, config, "data" in allow_change)
    if world.size > 1:
        _check_equal(split_record(images, named=False).fingerprint(), world)
    return data, images, tuple(notes)


def _saved_run(model: OpenModel) -> SavedRun | None:
    """Return the run that a model belongs to."""
    folder = Path(model.source)
    if model.run is None:
        return None
    return read_run(folder if (folder / "config.yaml").is_file() else folder.parent)


def _sources(saved: SavedRun) -> DataConfig:
    return saved.manifest.source(saved.config.data) if saved.manifest else saved.config.data


def _own_test_split(
    model: OpenModel, saved: SavedRun, config: DataConfig, changes: bool
) -> tuple[str, Part, list[str]]:
    run, before = saved.config, saved.manifest
    sources = _sources(saved)
    sources = replace(sources, allow_overlap=sources.allow_overlap or config.allow_overlap)
    splits = open_splits(sources, seed=run.seed)
    now = make_manifest(splits, sources)
    notes = [note for note in splits.notes if note.startswith("overlap allowed")]
    if before is None:
        notes += _count_changes(saved, now)
    else:
        remedy = "restore the data, or choose other images with --data"
        if changed := before.changes(now):
            text = f"the test split of {model.source!r} has changed since training: {'; '.join(changed)}"
            if not changes:
                raise ConfigError(f"{text}; {remedy}, or allow it with --allow-change data")
            notes.append(f"change allowed: {text}")
        if trained := before.trained(now):
            text = f"{len(trained)} of {len(splits.test)} test images were trained on, such as {trained[0]!r}"
            if not sources.allow_overlap:
                raise ConfigError(f"{model.source!r}: {text}; {remedy}, or allow it with --allow-overlap")
            notes.append(f"overlap allowed: {text}")
    names = before.class_names if before else model.model.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
    source = run.data.test or run.data.train
    return source, Part(splits.test.images, splits.test.indices, names or splits.class_names, source), notes


def _count_changes(saved: SavedRun, now: Manifest) -> list[str]:
    """Compare the numbers of images, for a run of version 0.3, which has no manifest."""
    then = saved.status.data if saved.status else None
    known, found = ((text or "").rpartition(", ")[0] for text in (then, now.fingerprint()))
    if not known or known == found:
        return []
    return [f"warning: the data has changed since training: {known}, now {found} (train+validation+test)"]


def _compare_with_training(
    images: Part, data: str, model: OpenModel, saved: SavedRun, config: DataConfig, world: World
) -> list[str]:
    """Refuse images that the model was trained on; return notes on what was allowed or not compared."""
    sources = _sources(saved)
    if _has_no_files(data) != _has_no_files(sources.train):
        return []
    try:
        splits = open_splits(replace(sources, allow_overlap=True), seed=saved.config.seed)
    except DataError as error:
        return [f"warning: not compared with the training images of {model.source!r}: {error}"]
    notes = []
    for part, what in ((splits.train, "was trained on"), (splits.validation, "chose its best epoch with")):
        common = shared(images, part)
        if not len(common):
            continue
        text = (
            f"data={data!r}: {model.source!r} {what} {len(common)} of these {len(images)} images, such as "
            f"{image_name(images, int(common[0]))!r}"
        )
        if part is splits.train and not config.allow_overlap:
            raise ConfigError(
                f"{text}; leave --data out to use the test split of that run, or allow it with "
                "--allow-overlap"
            )
        notes.append(f"overlap allowed: {text}" if part is splits.train else f"warning: {text}")
    if world.is_main_process:
        notes += equal_contents({"train": splits.train, "test": images})
    return notes


def _has_no_files(source: str) -> bool:
    return not os.path.exists(source) and source.partition("/")[0] in ("digits", "torch", "hfds")
