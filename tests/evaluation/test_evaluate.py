import dataclasses
import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from timm.data import ImageNetInfo, create_dataset, create_loader
from timm.utils import AverageMeter, accuracy

from localvit.data.config import DataConfig, DataError
from localvit.errors import ConfigError
from localvit.evaluation import evaluate
from localvit.evaluation.calibration import calibration, expected_calibration_error, wilson_interval
from localvit.evaluation.files import as_csv, as_json, confusion_matrix, draw_confusion
from localvit.evaluation.labels import read_class_map
from localvit.evaluation.top_k import TopKPredictions, by_class
from localvit.inference import open_model
from tests.data.conftest import png, write_tar
from tests.images import export_model, make_images

CPU = torch.device("cpu")
LEFT_OPEN = pytest.mark.filterwarnings("ignore::ResourceWarning")
"""timm's own data set leaves its files open."""
CLASSES = {"ant": 5, "bee": 7, "cat": 4, "dog": 6, "eel": 5, "fox": 4}
SYNSETS = ImageNetInfo("imagenet-1k").label_names()
PRESENT = [3, 400, 999]


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A model of six classes and images of them."""
    folder = tmp_path_factory.mktemp("six")
    return export_model(folder / "model", 6, list(CLASSES)), make_images(folder / "images", CLASSES)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A model of ImageNet's classes and images of three of them, as Imagenette has ten."""
    folder = tmp_path_factory.mktemp("thousand")
    photos = make_images(folder / "images", {SYNSETS[i]: 4 for i in PRESENT})
    return export_model(folder / "model", 1000), photos


def with_timm(checkpoint, data, **loading):
    """Loss, top-1 and top-5 by timm's own data set, loader, transforms and meters."""
    loaded = open_model(checkpoint, CPU)
    seen = loaded.preprocessing
    dataset = create_dataset(name="", root=data, split="validation")
    loader = create_loader(
        dataset,
        batch_size=7,
        num_workers=0,
        device=CPU,
        **dataclasses.asdict(seen),
        **loading,
    )
    meters = [AverageMeter() for _ in range(3)]
    with torch.inference_mode():
        for images, targets in loader:
            output = loaded.model(images)
            values = (torch.nn.functional.cross_entropy(output, targets), *accuracy(output, targets, (1, 5)))
            for meter, value in zip(meters, values, strict=True):
                meter.update(value.item(), len(images))
    return [meter.avg for meter in meters]


@LEFT_OPEN
@pytest.mark.parametrize("crop", [("center", 0.9), ("squash", 0.8), ("border", 0.875)])
@pytest.mark.parametrize("prefetch", [False, True])
def test_the_numbers_are_those_of_timm(tmp_path, crop, prefetch):
    mode, share = crop
    checkpoint = export_model(
        tmp_path / "model", 6, list(CLASSES), crop_mode=mode, crop_pct=share, interpolation="bicubic"
    )
    data = make_images(tmp_path / "images", CLASSES)
    found = evaluate(checkpoint, data, batch_size=4, device="cpu")
    metrics = found.metrics
    expected = with_timm(checkpoint, data, use_prefetcher=prefetch)
    assert [metrics.loss, metrics.top1, metrics.top5] == pytest.approx(expected, rel=1e-5)
    assert (found.preprocessing.crop_pct, found.preprocessing.crop_mode) == (share, mode)
    assert 0 < metrics.top1 < metrics.top5 < 100


def test_departures_from_the_models_own_preprocessing_count(six):
    other = evaluate(*six, device="cpu", config=DataConfig(crop_pct=0.5, interpolation="nearest"))
    assert other.preprocessing.crop_pct == 0.5
    assert other.metrics.loss != evaluate(*six, device="cpu").metrics.loss


def test_an_evaluation_fits_together(six):
    found = evaluate(*six, device="cpu")
    images = found.metrics.images
    assert images == sum(row.images for row in found.classes) == sum(CLASSES.values())
    assert {row.label: row.images for row in found.classes} == CLASSES
    assert found.metrics.top1 == pytest.approx(100 * sum(row.right for row in found.classes) / images)
    wrong = sum(row.images - row.right for row in found.classes)
    assert wrong == sum(one.images for one in found.confusions)
    assert found.top1.low < found.metrics.top1 < found.top1.high
    assert images == sum(one.images for one in found.calibration)
    labels, matrix = confusion_matrix(found)
    assert labels == list(CLASSES)
    assert matrix.sum(1) == pytest.approx([100] * 6)
    assert not matrix[:, -1].any()


def test_results_as_files(six):
    found = evaluate(*six, device="cpu")
    read = json.loads(as_json(found))
    assert read["metrics"]["images"] == 31
    assert set(read) >= {"top1", "top5", "calibration_error", "calibration", "classes", "confusions"}
    header, *rows = as_csv(found).splitlines()
    assert header.startswith("label,description,images,right,top1,confused_with")
    assert [row.split(",")[0] for row in rows] == list(CLASSES)
    assert draw_confusion(found).startswith(b"\x89PNG")


def test_what_is_no_number_is_null_in_json(six):

    found = evaluate(*six, device="cpu")
    broken = dataclasses.replace(found, metrics=dataclasses.replace(found.metrics, loss=math.nan))
    assert json.loads(as_json(broken))["metrics"]["loss"] is None


def test_some_of_imagenets_classes_are_found_by_name(thousand):
    free = evaluate(*thousand, device="cpu")
    assert [row.label for row in free.classes] == [SYNSETS[i] for i in PRESENT]
    assert free.classes[0].description == "tiger shark, Galeocerdo cuvieri"
    tied = evaluate(*thousand, device="cpu", restrict=True)
    assert tied.metrics.loss < free.metrics.loss
    assert {one.guess for one in tied.confusions} <= {SYNSETS[i] for i in PRESENT}
    assert not {one.guess for one in free.confusions} <= {SYNSETS[i] for i in PRESENT}
    assert tied.metrics.top5 == 100


@LEFT_OPEN
def test_restricting_is_leaving_the_other_outputs_out(thousand):
    checkpoint, data = thousand
    found = evaluate(checkpoint, data, device="cpu", restrict=True)
    loaded = open_model(checkpoint, CPU)
    loaded.model.head.weight.data = loaded.model.head.weight.data[PRESENT]
    loaded.model.head.bias.data = loaded.model.head.bias.data[PRESENT]
    seen = {
        name: getattr(loaded.preprocessing, name) for name in ("interpolation", "mean", "std", "crop_pct")
    }
    dataset = create_dataset(name="", root=data)
    loader = create_loader(dataset, (3, 16, 16), 12, num_workers=0, use_prefetcher=False, **seen)
    with torch.inference_mode():
        ((images, targets),) = loader
        output = loaded.model(images)
    assert found.metrics.loss == pytest.approx(torch.nn.functional.cross_entropy(output, targets).item())
    assert found.metrics.top1 == pytest.approx(100 * (output.argmax(1) == targets).float().mean().item())


def test_classes_are_found_by_what_people_call_them(thousand, tmp_path):
    info = ImageNetInfo("imagenet-1k")
    names = [info.label_name_to_description(SYNSETS[i]) for i in PRESENT]
    data = make_images(tmp_path / "images", dict.fromkeys(names, 4))
    by_word, by_synset = evaluate(thousand[0], data, device="cpu"), evaluate(*thousand, device="cpu")
    assert [row.label for row in by_word.classes] == names
    assert [row.description for row in by_synset.classes] == names


def test_outputs_of_larger_imagenets_have_names(thousand, tmp_path):
    synsets = ImageNetInfo("imagenet-12k").label_names()
    assert SYNSETS[3] in synsets
    found = evaluate(export_model(tmp_path / "model", len(synsets)), thousand[1], device="cpu")
    assert [row.label for row in found.classes] == sorted((SYNSETS[i] for i in PRESENT), key=synsets.index)


def test_a_word_for_two_classes_is_no_name(thousand, tmp_path):
    data = make_images(tmp_path / "images", {"crane": 2, "maypole": 2})  # a bird and a machine
    with pytest.raises(DataError, match="class 'crane' is not among the 1000"):
        evaluate(thousand[0], data, device="cpu")


def test_a_class_map_names_the_outputs(tmp_path):
    checkpoint = export_model(tmp_path / "model", 6)
    data = make_images(tmp_path / "images", {"bee": 4, "fox": 4})
    with pytest.raises(
        ConfigError, match=r"2 classes, .* has 6 outputs without names; name them with class_map"
    ):
        evaluate(checkpoint, data, device="cpu")
    (tmp_path / "map.txt").write_text("ant\nbee\ncat\ndog\neel\nfox\n")
    found = evaluate(checkpoint, data, device="cpu", class_map=str(tmp_path / "map.txt"))
    named = export_model(tmp_path / "named", 6, list(CLASSES))
    assert [row.label for row in found.classes] == ["bee", "fox"]
    (tmp_path / "short.txt").write_text("fox\nbee")  # output 0 and 1; the others have numbers
    short = evaluate(checkpoint, data, device="cpu", class_map=str(tmp_path / "short.txt"))
    assert [row.label for row in short.classes] == ["fox", "bee"]
    (tmp_path / "other.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match="class 'fox' is not among"):
        evaluate(named, data, device="cpu", class_map=str(tmp_path / "other.txt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\na\n", "line 3 repeats 'a'; give"),
        ("a\n\nb\n", "line 2 is empty"),
        ("", "line 1 is empty"),
        ("a\nb\nc\nd", "names 4"),
    ],
)
def test_a_class_map_that_cannot_be_right_is_refused(tmp_path, content, message):
    (tmp_path / "map.txt").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_class_map(str(tmp_path / "map.txt"), 3)


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfa b\n\xc3\xa9\n", b"a b\r\n\xc3\xa9\r\n", b"  a b \t\n\xc3\xa9 \n\n\n", b"a b\r\xc3\xa9"],
)
def test_a_class_map_of_any_editor_has_the_same_names(tmp_path, content):
    (tmp_path / "map.txt").write_bytes(content)
    assert read_class_map(str(tmp_path / "map.txt"), 3) == ("a b", "é")


@pytest.mark.parametrize(("content", "byte"), [("é".encode("latin-1"), 0), ("a\n".encode("utf-16"), 0)])
def test_a_class_map_that_is_not_utf8_is_refused(tmp_path, content, byte):
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"map.txt': byte {byte} is not UTF-8; save the file as UTF-8"):
        read_class_map(str(tmp_path / "map.txt"), 3)


def test_a_pickled_class_map_is_not_opened(tmp_path):
    (tmp_path / "map.pkl").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"use a \.txt file"):
        read_class_map(str(tmp_path / "map.pkl"), 3)


def test_numbered_classes_are_outputs(tmp_path):
    checkpoint = export_model(tmp_path / "model", 6, list(CLASSES))
    labels = {"0": b"4", "1": b"1", "2": b"4"}
    images = [(f"{key}.png", png(40 * int(key))) for key in labels]
    write_tar(tmp_path / "val-0.tar", *images, *((f"{key}.cls", label) for key, label in labels.items()))
    config = DataConfig(root=str(tmp_path), test_split="val-0.tar")
    found = evaluate(checkpoint, "wds/images", config=config, device="cpu")
    assert [(row.label, row.images) for row in found.classes] == [("1", 1), ("4", 2)]


def test_reassessed_labels(tmp_path):
    names = [f"ILSVRC2012_val_{i + 1:08d}" for i in range(7)]
    data = tmp_path / "images"
    make_images(data, {SYNSETS[0]: 7})
    for i, name in enumerate(names):
        (data / SYNSETS[0] / f"{i}.png").rename(data / SYNSETS[0] / f"{name}.JPEG")
    checkpoint = export_model(tmp_path / "model", 1000)
    loaded = open_model(checkpoint, CPU)
    rank = []  # outputs of each image, likeliest first
    from localvit.data.loading import eval_loader
    from localvit.data.splits import open_test_split

    for batch in eval_loader(open_test_split(str(data), DataConfig()), loaded.preprocessing, batch_size=1):
        with torch.inference_mode():
            rank.append(loaded.model(batch.images)[0].argsort(descending=True).tolist())
    right = [
        [rank[0][0]],  # the first guess
        [rank[1][900], rank[1][0]],  # one of two
        [rank[2][4]],  # the fifth guess
        [rank[3][5]],  # the sixth
        [],  # no class is right: does not count
        [rank[5][7], rank[5][3], rank[5][800]],
        [rank[6][500]],
    ]
    (tmp_path / "real.json").write_text(json.dumps(right))
    found = evaluate(checkpoint, str(data), device="cpu", real_labels=str(tmp_path / "real.json"))
    assert found.real is not None
    assert found.real.images == 6
    assert found.real.top1 == pytest.approx(100 * 2 / 6)
    assert found.real.top5 == pytest.approx(100 * 4 / 6)
    with pytest.raises(DataError, match="does not have 7 images"):
        evaluate(checkpoint, str(data), device="cpu", real_labels="default")


def test_reassessed_labels_need_imagenets_images_and_classes(six, thousand, tmp_path):
    with pytest.raises(ConfigError, match="ILSVRC-2012's 1000 classes"):
        evaluate(*six, device="cpu", real_labels="default")
    (tmp_path / "real.json").write_text(json.dumps([[1]] * 12))
    with pytest.raises(DataError, match=r"has no image '0\.png'"):
        evaluate(*thousand, device="cpu", real_labels=str(tmp_path / "real.json"))
    with pytest.raises(ConfigError, match="cannot be read"):
        evaluate(*thousand, device="cpu", real_labels=str(tmp_path / "none.json"))


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"workers": -1}])
def test_numbers_that_are_too_small_are_refused(six, setting):
    with pytest.raises(ConfigError, match="use at least"):
        evaluate(*six, device="cpu", **setting)


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_wilson_intervals_are_the_published_ones(right, images, low, high):
    found = wilson_interval(right, images)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.005)


@given(images=st.integers(1, 10**6), share=st.floats(0, 1))
def test_a_wilson_interval_ends_where_the_test_of_a_share_just_accepts(images, share):
    right = round(share * images)
    found = wilson_interval(right, images)
    assert 0 <= found.low <= 100 * right / images <= found.high <= 100
    z = statistics.NormalDist().inv_cdf(0.975)
    for end in (found.low / 100, found.high / 100):
        if 0 < end < 1:
            distance = abs(right / images - end) / math.sqrt(end * (1 - end) / images)
            assert distance == pytest.approx(z, rel=1e-3)


@given(st.lists(st.tuples(st.sampled_from([k / 30 for k in range(31)]), st.booleans()), min_size=1))
def test_calibration_error_is_what_a_slow_count_finds(answers):
    error = 0.0
    for i in range(15):
        # k / 30 is in a bin by whole numbers: above 2 i, up to 2 i + 2; nothing is below the first.
        inside = [(c, r) for c, r in answers if 2 * i < round(30 * c) <= 2 * i + 2 or (i == 0 and c == 0)]
        if inside:
            error += abs(sum(r for _, r in inside) - sum(c for c, _ in inside))
    confidences, right = (np.array(values) for values in zip(*answers, strict=True))
    found = expected_calibration_error(calibration(confidences.astype(float), right))
    assert found == pytest.approx(100 * error / len(answers), abs=1e-9)


def test_classes_and_confusions_by_hand():
    targets, guesses = np.array([0, 0, 0, 0, 2, 2]), np.array([0, 1, 3, 1, 2, 2])
    classes, confusions = by_class(targets, guesses, list("abcd"), list("ABCD"))
    assert [(r.label, r.description, r.images, r.right, r.top1) for r in classes] == [
        ("a", "A", 4, 1, 25.0),
        ("c", "C", 2, 2, 100.0),
    ]
    assert [(r.confused_with, r.confused) for r in classes] == [("b", 2), (None, 0)]
    assert [(c.label, c.guess, c.images) for c in confusions] == [("a", "b", 2), ("a", "d", 1)]


def test_a_prediction_for_each_image_and_no_more():
    predictions = TopKPredictions(3, CPU)
    predictions.add([0, 2], torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
    with pytest.raises(RuntimeError, match="1 images were not predicted exactly once"):
        predictions.merge()
    predictions.add([1], torch.tensor([[0.0, 0.0]]))
    predictions.merge()
    assert predictions.guesses[:, 0].tolist()[::2] == [1, 0]
    assert predictions.guesses[0].tolist() == [1, 0, -1, -1, -1]
    assert predictions.confidences == pytest.approx([1 / (1 + math.exp(-2)), 0.5, 1 / (1 + math.exp(-2))])
