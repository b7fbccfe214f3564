"""Assignment of classes of images to outputs of a model: by name, by a class map, or by number."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from timm.data import ImageNetInfo, RealLabelsImagenet

from localvit.data import DataError, Part, image_name
from localvit.errors import ConfigError
from localvit.inference import OpenModel

if TYPE_CHECKING:
    from jaxtyping import Int

_NUMBERED = ("wds/", "hfds/")
"""Sources whose classes may have no names; `"3"` is then output 3."""


def read_class_map(path: str, outputs: int) -> tuple[str, ...]:
    """Read the name of the class of each output, from a file in timm's form: one name per line, in order.

    Args:
        path: A `.txt`. timm's other form is a pickle, which is not read.
        outputs: Outputs of the model; the file may name fewer.

    Raises:
        ConfigError: if it is not such a file or not UTF-8, or has a duplicate, an empty line or too many
            lines.
    """
    what = f"class_map={path!r}"
    if not path.endswith(".txt") or not os.path.isfile(path):
        raise ConfigError(f"{what} is not accepted; use a .txt file with one class name per line")
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a byte-order mark
            names = [line.strip() for line in file.read().rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror}; name a text file") from error
    if not 0 < len(names) <= outputs:
        raise ConfigError(f"{what} names {len(names)} classes; the model has {outputs} outputs")
    for number, name in enumerate(names, 1):
        if not name or names.index(name) != number - 1:
            problem = f"repeats {name!r}" if name else "is empty"
            raise ConfigError(f"{what}: line {number} {problem}; give each output a name of its own")
    return tuple(names)


def label_by_outputs(images: Part, source: str, model: OpenModel, class_map: str | None) -> Part:
    """Return the same images, with labels that index the model's outputs.

    The source's classes are looked up in the class map, if there is one; else in the model's labels, then in
    its descriptions (see `OpenModel`). All of them must be found, and the model may have more. A
    source without names is labelled by numbers of outputs, and so is a model without names, if it has as
    many outputs as the source has classes.

    Args:
        images: Images with the classes of their source.
        source: Name of the source, for the message.
        model: The model.
        class_map: See `read_class_map`.

    Raises:
        ConfigError: if the class map cannot be used, or neither side has names and the numbers differ.
        DataError: if a class is not among the model's.
    """
    outputs = model.num_classes
    numbers = tuple(map(str, range(outputs)))
    if class_map is not None:
        choices = [read_class_map(class_map, outputs)]
    else:
        choices = [names for names in (model.labels, model.descriptions) if names is not None]
        if source.startswith(_NUMBERED):
            choices.append(numbers)
        elif not choices and len(images.class_names) == outputs:
            choices.append(images.class_names)
    if not choices:
        raise ConfigError(
            f"data={source!r} has {len(images.class_names)} classes, {model.source!r} has {outputs} outputs "
            "without names; name them with class_map"
        )
    names = next((names for names in choices if _each_once(images.class_names, names)), choices[0])
    return Part(images.images, images.indices, names, source)


def _each_once(wanted: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether each name means one output; ImageNet has cranes that fly and cranes that lift."""
    counts = Counter(names)
    return all(counts[name] == 1 for name in wanted)


def read_real_labels(path: str, images: Part, model: OpenModel) -> Int[np.ndarray, "N most"]:
    """Read the reassessed labels (ReaL) of the ILSVRC-2012 validation images.

    Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159: an image may have several right classes; a
    few have none and do not count.

    Args:
        path: `"default"` for the labels that timm ships, or a JSON file in the authors' form: a list with
            the right classes of `ILSVRC2012_val_00000001.JPEG` and so on.
        images: All validation images, in any order.
        model: Model with the outputs of ILSVRC-2012.

    Returns:
        (N, most) int64: the right classes of each image, filled up with -1.

    Raises:
        ConfigError: if the model has other classes, or there is no such file.
        DataError: if the images are not those of the file.
    """
    what = f"real_labels={path!r}"
    if model.labels != tuple(ImageNetInfo("imagenet-1k").label_names()):
        raise ConfigError(f"{what} needs ILSVRC-2012's 1000 classes in timm's order; use another model")
    names = [os.path.basename(image_name(images, i)) for i in range(len(images))]
    try:
        known = RealLabelsImagenet(names, None if path == "default" else path).real_labels
        rows = [known[name] for name in names]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{what} cannot be read: {error}; use 'default' or the authors' file") from error
    except AssertionError as error:
        raise DataError(
            f"{what} does not have {len(names)} images; use ILSVRC-2012's validation set"
        ) from error
    except KeyError as error:
        raise DataError(f"{what} has no image {error}; use the ILSVRC-2012 validation images") from error
    table = np.full((len(rows), max(map(len, rows), default=1)), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
