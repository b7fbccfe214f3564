"""Annotated shapes and types of arrays hold where images are read and augmented, and answers are counted."""

import importlib
import inspect
import re
import sys
import typing

import beartype
import jaxtyping
import numpy as np
import pytest
import torch

from localvit.data.config import AugmentConfig, DataConfig
from localvit.data.loading import eval_loader, train_loader
from localvit.data.splits import open_splits, open_test_split
from localvit.evaluation import calibration, evaluate
from localvit.evaluation.files import confusion_matrix
from localvit.evaluation.metrics import Tally
from tests.images import PREPROCESSING, export_model, make_images

MODULES = [
    "evaluation.top_k",
    "evaluation.calibration",
    "evaluation.metrics",
    "evaluation.files",
    "evaluation.labels",
    "data.images",
    "data.sources",
    "data.augment",
]


def annotated(module):
    """Yield owner and name of the functions of a module whose annotations have shapes."""
    classes = [
        kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__
    ]
    for owner in (module, *classes):
        for name, function in list(vars(owner).items()):
            texts = getattr(function, "__annotations__", {}).values() if inspect.isfunction(function) else ()
            if any(re.search(r"\[(np|torch)\.\w+, '", str(text)) for text in texts):
                yield owner, name, function


@pytest.fixture
def checked(monkeypatch):
    """Check the arguments and results of all of them; gives the set of those that were called."""
    called = set()
    for path in MODULES:
        module = importlib.import_module(f"localvit.{path}")
        names = vars(jaxtyping) | vars(module)
        for owner, name, function in annotated(module):
            monkeypatch.setattr(function, "__annotations__", typing.get_type_hints(function, names))
            wrapped = jaxtyping.jaxtyped(function, typechecker=beartype.beartype)

            def noted(*arguments, _wrapped=wrapped, _name=f"{path}.{name}", **options):
                called.add(_name)
                return _wrapped(*arguments, **options)

            for place in [owner, *sys.modules.values()]:
                if vars(place).get(name) is function:
                    monkeypatch.setattr(place, name, noted)
    return called


def test_shapes_hold_from_the_file_to_the_report(checked, tmp_path):
    data = make_images(tmp_path / "images", {"a": 6, "b": 5})
    model = export_model(tmp_path / "model", 2, ["a", "b"])
    found = evaluate(model, data, batch_size=4, device="cpu")
    confusion_matrix(found)
    augment = AugmentConfig(auto_augment="rand-m5-inc1", erase=0.5)
    train = open_splits(DataConfig(train=data, holdout=0.2, fraction=0.7)).train
    next(iter(train_loader(train, augment, PREPROCESSING, batch_size=2, seed=0)))
    next(iter(eval_loader(open_test_split(data, DataConfig()), PREPROCESSING, batch_size=2)))
    assert checked >= {
        "evaluation.top_k.add",
        "evaluation.top_k.by_class",
        "evaluation.calibration.calibration",
        "evaluation.metrics.add",
        "evaluation.files.confusion_matrix",
        "data.sources.stratified_holdout",
        "data.sources.nested_subset",
        "data.images.read_pixels",
        "data.augment.__call__",
    }


def test_other_shapes_are_refused(checked):
    with pytest.raises(jaxtyping.TypeCheckError):
        calibration.calibration(np.zeros(3), np.zeros(4, dtype=bool))
    with pytest.raises(jaxtyping.TypeCheckError):
        Tally(torch.device("cpu")).add(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
