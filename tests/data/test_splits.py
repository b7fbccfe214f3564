import builtins

import numpy as np
import pytest
from hypothesis import given, strategies as st

from localvit.data.config import DataConfig, DataError
from localvit.data.sources import stratified_holdout
from localvit.data.splits import open_splits


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80),
    share=st.floats(0.01, 0.49),
    seed=st.integers(0, 2**32 - 1),
)
def test_holdout_is_disjoint_complete_stratified_and_fixed(labels, share, seed):
    labels = np.array(labels)
    count = max(1, round(share * len(labels)))
    kept, held = stratified_holdout(labels, count, seed)
    again = stratified_holdout(labels, count, seed)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    assert len(held) <= count
    assert np.array_equal(kept, again[0])
    assert np.array_equal(held, again[1])
    for label in np.unique(labels):
        members, gone = np.sum(labels == label), np.sum(labels[held] == label)
        assert gone < members  # something of each class stays to learn from
        assert gone <= members * count / len(labels) + 2  # and no class pays for the others


def images_of(part):
    """Identities of the images of a part."""
    return {(id(part.images), int(i)) for i in part.indices}


def test_digits_splits_are_disjoint_and_the_test_is_the_same_for_every_seed():
    one, two = open_splits(DataConfig(), seed=1), open_splits(DataConfig(), seed=2)
    assert (len(one.train), len(one.validation), len(one.test)) == (1167, 130, 500)
    assert np.array_equal(one.test.images.pixels, two.test.images.pixels)
    assert not np.array_equal(one.validation.indices, two.validation.indices)
    assert np.array_equal(one.validation.indices, open_splits(DataConfig(), seed=1).validation.indices)
    assert not set(one.train.indices) & set(one.validation.indices)
    # train and test come from different arrays: compare them by content
    train = {p.tobytes() for p in one.train.images.pixels}
    assert not train & {p.tobytes() for p in one.test.images.pixels}
    assert one.notes == ("validation: 130 images held out from 'digits' (chosen by seed 1)",)


def test_one_source_gives_three_splits(make_folder):
    config = DataConfig(train=str(make_folder("images", {"a": 50, "b": 50})))
    one, two = open_splits(config, seed=1), open_splits(config, seed=2)
    assert (len(one.train), len(one.validation), len(one.test)) == (81, 9, 10)
    assert np.array_equal(one.test.indices, two.test.indices)
    parts = [images_of(p) for p in (one.train, one.validation, one.test)]
    assert len(set.union(*parts)) == 100
    assert "test: 10 images held out" in one.notes[0]
    assert "the same for every seed" in one.notes[0]


def test_given_test_is_reported_and_validation_held_out(make_folder, make_tar):
    train = make_tar("train.tar", {"a": 50, "b": 50})
    test = make_folder("val", {"a": 5, "b": 5})
    splits = open_splits(DataConfig(train=str(train), test=str(test)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 10)
    assert len(splits.notes) == 1


def test_subfolders_are_splits(make_folder, tmp_path):
    make_folder("set/train", {"a": 10, "b": 10})
    make_folder("set/val", {"a": 2, "b": 2})
    two = open_splits(DataConfig(train=str(tmp_path / "set")))
    assert (len(two.train), len(two.validation), len(two.test)) == (18, 2, 4)  # val is reported
    make_folder("set/test", {"a": 3, "b": 3})
    three = open_splits(DataConfig(train=str(tmp_path / "set")))
    assert (len(three.train), len(three.validation), len(three.test)) == (20, 4, 6)  # val chooses
    assert three.notes == ()


def test_classes_called_val_and_test_are_classes_where_there_is_no_train(make_folder):
    splits = open_splits(DataConfig(train=str(make_folder("words", {"test": 10, "val": 10}))))
    assert splits.class_names == ("test", "val")


def test_one_source_for_two_splits_is_refused(make_folder, tmp_path):
    folder = make_folder("images", {"a": 10, "b": 10})
    train, other = make_folder("train", {"a": 10, "b": 10}), tmp_path / "link"
    other.symlink_to(folder)
    with pytest.raises(DataError, match=r"data\.test=.* shares all of its 20 images with data\.train="):
        open_splits(DataConfig(train=str(folder), test=str(other)))
    with pytest.raises(DataError, match=r"data\.validation=.* shares all of its 20 images with data\.test="):
        open_splits(DataConfig(train=str(train), test=str(folder), validation=str(folder)))


def test_a_class_that_training_lacks_is_named(make_folder):
    train, test = make_folder("train", {"a": 10, "b": 10}), make_folder("test", {"a": 2, "c": 2})
    with pytest.raises(DataError, match=r"class 'c' is not among the 2 known classes \(a, b\)"):
        open_splits(DataConfig(train=str(train), test=str(test)))


def test_a_class_without_test_images_is_a_note(make_folder):
    train, test = make_folder("train", {"a": 10, "b": 10, "c": 10}), make_folder("test", {"a": 2, "c": 2})
    notes = open_splits(DataConfig(train=str(train), test=str(test))).notes
    assert "test: no images of 1 of 3 classes, such as 'b'" in notes
    assert not any(note.startswith("validation: no images") for note in notes)


def test_too_few_classes_and_empty_folders(make_folder, tmp_path):
    with pytest.raises(DataError, match="has 1 class"):
        open_splits(DataConfig(train=str(make_folder("one", {"a": 10}))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 images"):
        open_splits(DataConfig(train=str(tmp_path / "empty")))


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'localvit\[study\]'"):
        open_splits(DataConfig())


def test_a_fraction_is_stratified_nested_and_the_same_for_every_seed():
    whole = open_splits(DataConfig(holdout=0.2), seed=0)
    parts = {f: open_splits(DataConfig(holdout=0.2, fraction=f), seed=0) for f in (0.5, 0.1, 0.02)}
    taken = {f: set(part.train.indices.tolist()) for f, part in parts.items()}
    assert taken[0.02] < taken[0.1] < taken[0.5] < set(whole.train.indices.tolist())
    for f, part in parts.items():
        counts, all_counts = (np.bincount(p.labels) for p in (part.train, whole.train))
        assert np.abs(counts - f * all_counts).max() <= 1
        assert counts.min() >= 1
        assert part.validation.indices.tolist() == whole.validation.indices.tolist()
        assert part.test.indices.tolist() == whole.test.indices.tolist()
        assert f"train: {len(part.train)} of {len(whole.train)} images" in " ".join(part.notes)
    # Another seed holds other images out for validation; of the rest, it takes the same ones first.
    other = open_splits(DataConfig(holdout=0.2, fraction=0.5), seed=1)
    held = set(other.validation.indices.tolist()) | set(whole.validation.indices.tolist())
    different = taken[0.5] ^ set(other.train.indices.tolist())
    assert len(different - held) < 0.1 * len(taken[0.5])


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_fraction_is_a_share(fraction):
    with pytest.raises(DataError, match=r"data\.fraction"):
        DataConfig(fraction=fraction)
