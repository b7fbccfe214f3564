import json
from dataclasses import replace

import pytest
import timm

from localvit.cli import main
from localvit.models import count, names, registry
from localvit.models.table import VARIANTS
from localvit.surgery import supported_models


def test_every_variant_stands_after_its_baseline():
    table = list(registry())
    assert table == names()
    assert len(set(table)) == len(table)
    assert {v.base for v in VARIANTS.values()} | set(VARIANTS) == set(table)
    assert all(table.index(v.base) < table.index(name) for name, v in VARIANTS.items())
    assert all(timm.is_model(name) for name in table)


@pytest.mark.parametrize("name", names())
def test_the_shipped_card_is_what_is_counted(name):
    assert registry()[name] == count(name), "python -m benchmarks.registry writes the cards anew"


def test_a_card_is_compared_with_what_is_counted(capsys, monkeypatch):
    name = "localvit_tiny_patch16_224"
    assert main(["models", name, "--check"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    changed = replace(registry()[name], dead_parameters=0)
    monkeypatch.setattr("localvit.models.registry", lambda: {name: changed})
    assert main(["models", name, "--check"]) == 1
    assert capsys.readouterr().out == f"{name}: the table that comes with localvit differs\n"


def test_json(capsys):
    assert main(["models", "--json"]) == 0
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)}
    assert list(entries) == names()
    tiny = entries["localvit_tiny_patch16_224"]
    assert (tiny["parameters"], tiny["gmacs"], tiny["top1"]) == (5_908_696, 1.2665, 74.84)
    assert tiny["args"] == {"num_heads": 4}
    assert tiny["locality"] == {"gate_reduction": 192.0}
    assert tiny["weights"].endswith("localvit_t.pth")
    assert entries["deit_tiny_patch16_224"]["locality"] is None
    assert entries["localvit_tiny_relu6_x6_patch16_224"]["weights"] is None
    assert entries["localvit_t2t_vit_7"]["also"] == {"tokens_to_token": {"gate": "none"}}


def test_a_size_that_was_not_trained_says_so():
    for name, variant in VARIANTS.items():
        assert bool(timm.get_pretrained_cfg(name).has_weights) == (variant.file is not None)
    card = json.loads(_json_card("localvit_pvt_large"))
    assert card["entry"]["weights"] is None
    assert any("did not train" in note for note in card["notes"])


def test_table_shows_names_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    assert "localvit_tiny_relu6_x6_patch16_224" in capsys.readouterr().out


def _json_card(name: str) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["models", name, "--json"]) == 0
    return out.getvalue()


def test_a_card_tells_what_confounds_the_comparison(capsys):
    assert main(["models", "localvit_tiny_patch16_224"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for fact in (
        "Attention heads: 3 in the control, 4 with locality",
        "No pre-norm",
        "No drop-path",
        "class token skips the feed-forward networks",
        "312,196 parameters that no output depends on",
        "matched localvit_tiny_patch16_224_matched",
        "top-1 74.84 %",
    ):
        assert fact in text, fact


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.endswith("_matched")])
def test_matched_variants_have_no_confounder_around_the_network(name):
    text = " ".join(json.loads(_json_card(name))["confounders"])
    for word in ("heads", "pre-norm", "drop-path", "skips", "no output depends"):
        assert word not in text


def test_the_class_token_of_a_pyramid_skips_the_last_stage_only():
    text = " ".join(json.loads(_json_card("localvit_pvt_tiny"))["confounders"])
    assert "The class token skips 2 of 8 feed-forward networks" in text
    assert "class token" not in " ".join(
        json.loads(_json_card("localvit_swin_tiny_patch4_window7_224"))["confounders"]
    )


def test_a_baseline_has_a_card_too(capsys):
    assert main(["models", "pvt_tiny"]) == 0
    assert "13,229,288 parameters" in capsys.readouterr().out


SUPPORTED = ["models", "--supported"]


def test_supported_architectures(capsys):
    assert main([*SUPPORTED, "swin_t*"]) == 0
    assert capsys.readouterr().out == "swin_tiny_patch4_window7_224 (SwinTransformer): 12 FFNs\n"
    assert main([*SUPPORTED, "resnet18"]) == 0
    assert capsys.readouterr().out.startswith("resnet18 (resnet): refused; it is a convolutional network")
    assert main(SUPPORTED) == 0
    assert "| `Beit` | 7 | `beit_base_patch16_224` | accepted |" in capsys.readouterr().out.splitlines()


def test_supported_architectures_as_json(capsys):
    assert main([*SUPPORTED, "swin_t*", "--json"]) == 0
    name = "swin_tiny_patch4_window7_224"
    entry = {"architecture": name, "model": "SwinTransformer", "accepted": True, "ffns": 12, "note": ""}
    assert json.loads(capsys.readouterr().out) == [entry]


def test_the_shipped_table_is_compared(capsys, monkeypatch):
    arguments = [*SUPPORTED, "deit_tiny_*", "--check"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "no difference\n"
    shipped = supported_models("deit_tiny_*")
    changed = [replace(shipped[0], ffns=11), *shipped[1:]]
    monkeypatch.setattr("localvit.surgery.supported_models", lambda pattern: changed)
    assert main(arguments) == 1
    expected = f"{shipped[0].architecture}: the table that comes with localvit differs\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--jason"], ""),
        (["localvit_pvt_tny"], "did you mean 'localvit_pvt_tiny'?"),
        (["--supported", "swn*"], "no timm architecture matches 'swn*'; use a pattern such as 'swin*'"),
        (["--no-supported"], ""),
        (["--supported", "--no-check"], ""),
    ],
)
def test_wrong_use_is_one_line(arguments, hint, capsys):
    assert main(["models", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert hint in captured.err
