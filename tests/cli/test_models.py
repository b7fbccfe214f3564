import json

import timm

from localvit.cli import main
from localvit.models import VARIANTS


def test_json_has_every_name_and_its_baseline(capsys):
    assert main(["models", "--json"]) == 0
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)}
    assert set(VARIANTS) <= set(entries)
    assert {v.base for v in VARIANTS.values()} <= set(entries)
    tiny = entries["localvit_tiny_patch16_224"]
    assert (tiny["parameters"], tiny["gmacs"], tiny["top1"]) == (5_908_696, 1.2665, 74.84)
    assert tiny["args"] == {"num_heads": 4}
    assert tiny["locality"] == {"gate_reduction": 192.0}
    assert tiny["weights"].endswith("localvit_t.pth")
    assert entries["deit_tiny_patch16_224"]["locality"] is None
    assert entries["localvit_tiny_relu6_x6_patch16_224"]["weights"] is None
    assert all(timm.is_model(name) for name in entries)


def test_table_shows_names_whole(capsys):
    assert main(["models"]) == 0
    assert "localvit_tiny_relu6_x6_patch16_224" in capsys.readouterr().out


def test_wrong_use_is_one_line(capsys):
    assert main(["models", "--jason"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
