"""Files of other engines: they compute what the model does, or they are not there."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import timm
import torch

import localvit
from localvit.data.config import DataConfig
from localvit.engines.info import ExportInfo
from localvit.engines.open import READS, open_engine
from localvit.errors import ConfigError
from localvit.export import write
from localvit.export.parity import Inputs, ParityError, check_parity
from localvit.export.write import FORMATS, ExportFailed, check_export, export_model
from localvit.models.build import preprocessing_for

SIZE = 16
VIT = {"img_size": SIZE, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}
# A family each, as small as its structure allows.
FAMILIES = {
    "deit": ("localvit_tiny_patch16_224", {"embed_dim": 96, "depth": 1, "num_heads": 2, "img_size": 32}),
    "swin": (
        "localvit_swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 32},
    ),
    "pvt": (
        "localvit_pvt_tiny",
        {
            "embed_dims": (8, 16),
            "depths": (1, 1),
            "num_heads": (1, 2),
            "mlp_ratios": (8.0, 8.0),
            "sr_ratios": (8, 1),
            "img_size": 32,
        },
    ),
    "t2t": (
        "localvit_t2t_vit_7",
        {"embed_dim": 96, "depth": 1, "num_heads": 2, "token_dim": 16, "img_size": 32},
    ),
    "tnt": (
        "localvit_tnt_tiny_patch16_224",
        {
            "embed_dim": 24,
            "inner_dim": 12,
            "depth": 1,
            "num_heads_outer": 2,
            "num_heads_inner": 2,
            "img_size": 32,
        },
    ),
}


def info_of(model, size, **changes):
    seen = dataclasses.replace(preprocessing_for(model, DataConfig()), input_size=(3, size, size))
    info = ExportInfo.of(seen, architecture="a model", num_classes=model.num_classes)
    return dataclasses.replace(info, **changes)


def photos(size):
    return torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(7))


def small(**args):
    """A plain ViT with locality and statistics that are not those of a new model."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, **args})
    localvit.localize(model, localvit.LocalityConfig(gate="eca"))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def export(model, file, format="torch", **options):
    return export_model(model, file, format, info_of(model, SIZE), photos, **options)


@pytest.fixture
def traced_once(monkeypatch):
    """Tracing takes most of the time; formats of one model share the graph."""
    trace, graphs = write.export_program, {}

    def once(model, info):
        if info not in graphs:
            graphs[info] = trace(model, info)
        return graphs[info]

    monkeypatch.setattr(write, "export_program", once)


def opened(file, kinds=("onnxruntime", "openvino", "torch")):
    """By all engines that read it."""
    return [open_engine(kind, file, threads=1) for kind in kinds if file.suffix in READS[kind]]


def convolutions(model):
    graph = write.export_program(model.eval(), info_of(model, SIZE)).graph
    return sum(node.target is torch.ops.aten.conv2d.default for node in graph.nodes)


def test_the_graph_is_that_of_the_fast_form(monkeypatch):
    model = small(depth=3)
    assert (
        convolutions(model) == 1 + 2
    )  # patches; depth-wise ones of all blocks but the last, which is not read
    monkeypatch.setenv("LOCALVIT_KERNELS", "plain")
    assert convolutions(model) == 1 + 3  # of all blocks; point-wise layers of this size are linear


def test_what_has_no_fast_form_is_exported_as_it_is(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, SIZE), torch.nn.Flatten())
    model.num_classes = 5
    half = (0.5,) * 3
    info = ExportInfo(
        architecture="none",
        num_classes=5,
        input_size=(3, SIZE, SIZE),
        mean=half,
        std=half,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
    )
    assert export_model(model, tmp_path / "a.pt2", "torch", info, photos).passed


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_every_family(family, tmp_path, traced_once):
    name, args = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **args).eval()
    images = torch.randn(5, 3, 32, 32)
    for format in ("torch", "onnx"):
        file = tmp_path / f"model{FORMATS[format].suffixes[0]}"
        parity = export_model(model, file, format, info_of(model, 32), photos)
        checked = [(case.inputs, case.batch) for case in parity.cases]
        assert checked == [("random", 1), ("random", 3), ("real", 1), ("real", 3)]
        assert all(case.difference < 1e-5 * case.scale for case in parity.cases)
        for engine in opened(file):  # OpenVINO reads .onnx; its own files are made of them
            assert (engine.input_shape, engine.output_shape) == ((None, 3, 32, 32), (None, 5))
            torch.testing.assert_close(engine(images), model(images), rtol=1e-4, atol=1e-5)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".pt2", ".onnx"}


@torch.no_grad()
def test_any_size(tmp_path, traced_once):
    model = small(dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 32, 12)
    for format in ("torch", "onnx"):
        file = tmp_path / f"model{FORMATS[format].suffixes[0]}"
        parity = export(model, file, format, dynamic_size=True)
        assert {case.size for case in parity.cases} == {(16, 16), (20, 24)}
        (engine,) = opened(file, (FORMATS[format].engine,))
        assert engine.info.size_step == 4
        assert engine.input_shape == (None, 3, None, None)
        torch.testing.assert_close(engine(images), model(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_openvino_s_own_files(tmp_path):
    import openvino

    model = small(global_pool="avg").eval()  # reads all tokens, so all weights
    export(model, tmp_path / "model.xml", "openvino")
    assert {path.name for path in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    (engine,) = opened(tmp_path / "model.xml")
    saved = openvino.Core().read_model(tmp_path / "model.xml")
    assert (saved.input(0).any_name, saved.output(0).any_name) == ("images", "logits")
    assert (engine.input_shape, engine.output_shape) == ((None, 3, 16, 16), (None, 5))
    assert dataclasses.replace(engine.info, made_with="") == info_of(model, SIZE, made_with="")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (tmp_path / "model.bin").stat().st_size > 0.9 * weights  # not halved
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(engine(images), model(images), rtol=1e-4, atol=1e-5)


def test_any_size_of_a_model_with_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fails on images of 20x24.*--set dynamic_img_size=true"):
        export(small(), tmp_path / "model.pt2", dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_any_size_of_swin_is_refused_before_it_is_traced(tmp_path):
    name, args = FAMILIES["swin"]
    model = timm.create_model(name, num_classes=5, dynamic_img_size=True, **args)
    with pytest.raises(ConfigError, match=r"--dynamic-size: SwinTransformer does not.*img_size=\["):
        export_model(model, tmp_path / "model.pt2", "torch", info_of(model, 32), photos, dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_is(tmp_path):
    model = small().train()
    model.blocks.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    export(model, tmp_path / "model.pt2")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def broken(monkeypatch):
    """Exports of a model with one weight that is a little off."""
    right = write.export_program

    def wrong(model, info):
        import copy

        model = copy.deepcopy(model)
        with torch.no_grad():
            model.head.weight[0, 0] += 0.05
        return right(model, info)

    monkeypatch.setattr(write, "export_program", wrong)


def test_a_wrong_file_is_never_there(tmp_path, broken):
    file = tmp_path / "model.pt2"
    with pytest.raises(
        ParityError, match=r"model\.pt2: the exported model differs .* by up to 0\.\d+"
    ) as error:
        export(small(), file)
    assert not error.value.parity.passed
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_does_not_replace_a_right_one(tmp_path, broken):
    file = tmp_path / "model.pt2"
    file.write_bytes(b"old")
    with pytest.raises(ParityError):
        export(small(), file, overwrite=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_an_exporter_that_gives_up_is_one_line(tmp_path, monkeypatch):
    def give_up(*_):
        raise RuntimeError("no such operator\nand three pages more")

    monkeypatch.setattr(write, "export_program", give_up)
    with pytest.raises(ExportFailed, match=r"^a model as torch: no such operator$"):
        export(small(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("add", "passed"), [(0.9e-4, True), (1.1e-4, False), (math.nan, False), (math.inf, False)]
)
def test_a_difference_is_judged_by_the_largest_logit(add, passed):
    def model(images):
        return images.flatten(1) * 4  # up to 8

    def engine(images):
        logits = model(images)
        logits[-1, 0] += 8 * add
        return logits

    images = torch.tensor([[1.0, -2.0]]).reshape(1, 1, 1, 2)
    good = check_parity(model, model, [Inputs("random", images)])
    assert good.passed
    assert good.worst.difference == 0
    parity = check_parity(model, engine, [Inputs("random", images), Inputs("real", images)])
    assert parity.passed is passed
    assert parity.worst.scale == 8
    assert not passed or parity.worst.relative == pytest.approx(add, rel=1e-2)


def test_another_shape_is_a_difference():
    images = torch.ones(3, 2, 1, 1)
    parity = check_parity(lambda x: x.flatten(1), lambda x: x[:1].flatten(1), [Inputs("random", images)])
    assert not parity.passed


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("model.onnx", "torch", r"ends in \.pt2"),
        ("old.pt2", "torch", r"old\.pt2' exists"),
        ("old.xml", "openvino", r"old\.bin' exists"),
        ("nowhere/model.pt2", "torch", "nowhere' does not exist"),
        ("model.tflite", "tflite", "use onnx, openvino, torch"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_done(name, format, message, tmp_path):
    for old in ("old.pt2", "old.bin"):
        (tmp_path / old).touch()
    with pytest.raises(ConfigError, match=message):
        export_model(None, tmp_path / name, format, None, None)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_missing_package_is_named_with_its_extra(format, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = tmp_path / f"model{FORMATS[format].suffixes[0]}"
    with pytest.raises(ConfigError, match=r"needs onnx, onnxscript, \w+; run pip install 'localvit\[exp"):
        check_export(file, format)
    with pytest.raises(ConfigError, match=r"localvit\[export\]"):
        open_engine(FORMATS[format].engine, file)


def test_files_that_are_not_ours(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    torch.export.save(
        torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),)), tmp_path / "other.pt2"
    )
    with pytest.raises(ConfigError, match=r"other\.pt2' was not written by localvit export"):
        open_engine("torch", tmp_path / "other.pt2")
    with pytest.raises(ConfigError, match=r"bad\.onnx' is not accepted for engine='torch'; use \.pt2"):
        open_engine("torch", tmp_path / "bad.onnx")
    with pytest.raises(ConfigError, match="does not exist"):
        open_engine("torch", tmp_path / "none.pt2")
    for kind in ("onnxruntime", "openvino"):
        with pytest.raises(ConfigError, match=rf"bad\.onnx' cannot be opened with {kind}") as error:
            open_engine(kind, tmp_path / "bad.onnx")
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(small(), file, "onnx")
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_size": [3, 16, 32]},
            r"input_size is \(3, 16, 32\) in its metadata but \(3, \d+, \d+\) in",
        ),
        ({"input_size": [1, SIZE, SIZE], "mean": [0.5], "std": [0.5]}, r"input_size is \(1, .* in its model"),
        (
            {"num_classes": 7, "labels": None, "descriptions": None},
            r"num_classes is \(7,\) in its .* but \(5,\)",
        ),
    ],
)
def test_metadata_of_another_model_are_refused(tmp_path, onnx_file, change, message):
    import onnx

    file = tmp_path / "model.onnx"
    graph = onnx.load(str(onnx_file))
    (entry,) = graph.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | change)
    onnx.save(graph, str(file))
    for kind in ("onnxruntime", "openvino"):
        with pytest.raises(ConfigError, match=rf"model\.onnx': {message}.*; export it again"):
            open_engine(kind, file)


def test_what_is_known_of_a_model_survives(tmp_path):
    info = info_of(small(), SIZE, labels=tuple("abcde"), descriptions=tuple("ABCDE"), size_step=4)
    assert ExportInfo.from_json(info.to_json(), "file") == info
    later = json.dumps(json.loads(info.to_json()) | {"new": 1})
    assert ExportInfo.from_json(later, "file") == info


@pytest.mark.parametrize(
    "change",
    [
        {"std": [0, 1, 1]},
        {"mean": [0.5]},
        {"mean": "abc"},
        {"input_size": [3, 10**9, 16]},
        {"input_size": []},
        {"interpolation": "magic"},
        {"crop_pct": 0},
        {"labels": ["one"]},
        {"labels": [1, 2, 3, 4, 5]},
    ],
)
def test_values_that_cannot_be_are_refused(change):
    values = json.loads(info_of(small(), SIZE).to_json()) | change
    for text in (json.dumps(values), "", "[]", "{}"):
        with pytest.raises(ConfigError, match="'file' was not written by localvit export, or is damaged"):
            ExportInfo.from_json(text, "file")


def test_a_pair_of_files_is_replaced_as_a_pair(tmp_path, monkeypatch):
    """At every instant, the named file is absent or belongs to its weights."""
    new = tmp_path / "new"
    new.mkdir()
    for folder, text in ((tmp_path, "old"), (new, "new")):
        for suffix in (".xml", ".bin"):
            (folder / f"model{suffix}").write_text(text)
    replace, seen = write.os.replace, []

    def watched(source, target):
        replace(source, target)
        seen.append({path.suffix: path.read_text() for path in tmp_path.glob("model.*")})

    monkeypatch.setattr(write.os, "replace", watched)
    write._into_place(new / "model.xml", Path(tmp_path / "model.xml"), (".xml", ".bin"))
    assert seen == [{".bin": "new"}, {".bin": "new", ".xml": "new"}]
