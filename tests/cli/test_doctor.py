"""`localvit doctor`: facts for a bug report."""

import json
import re

import pytest
import torch

from localvit.acceleration.native import build as native_build
from localvit.bench import diagnosis
from localvit.cli import main
from localvit.version import __version__

from ..acceleration.test_build import needs_compiler


def doctor(capsys) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@needs_compiler
def test_facts_of_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOCALVIT_KERNELS", raising=False)
    facts = doctor(capsys)
    assert facts["versions"]["localvit"].startswith(f"{__version__}, ")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["native kernels"]["native kernels"] == f"in use, {next((tmp_path / 'localvit').iterdir())}"
    assert facts["native kernels"]["cache folder"].endswith("mode 700")
    assert set(facts["extras"]) == {"study", "export", "parquet", "cluster", "tracking", "hf"}
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, value in ((n, v) for section in facts.values() for n, v in section.items()):
        assert any(re.fullmatch(rf"  {re.escape(name)} +{re.escape(value)}", line) for line in lines)


FAST = "not in use: LOCALVIT_KERNELS='fast' is not accepted; use auto or plain"


@pytest.mark.parametrize(
    ("name", "value", "fact", "expected"),
    [
        ("CXX", "no-such", "compiler", "no C++ compiler is installed (looked for no-such)"),
        ("CXX", "no-such", "native kernels", "not in use: no C++ compiler is installed (looked for no-such)"),
        ("LOCALVIT_KERNELS", "plain", "native kernels", "not in use: LOCALVIT_KERNELS=plain"),
        ("LOCALVIT_KERNELS", "fast", "native kernels", FAST),
    ],
)  # fmt: skip
def test_why_native_kernels_are_not_in_use(capsys, monkeypatch, name, value, fact, expected):
    monkeypatch.setenv(name, value)
    assert doctor(capsys)["native kernels"][fact] == expected


@needs_compiler
def test_a_cache_that_others_can_change_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "localvit").mkdir()
    (tmp_path / "localvit").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "load", lambda folder, load=native_build.load: load(folder))
    facts = doctor(capsys)["native kernels"]
    assert "compiled for this process only" in facts["native kernels"]
    assert "can be changed by other users (mode 777)" in facts["native kernels"]
    assert facts["cache folder"].endswith("mode 777")


def test_extras_that_are_missing_come_with_the_command_that_installs_them(capsys, monkeypatch):
    monkeypatch.setattr(diagnosis, "_version", lambda name: None if name == "submitit" else "1")
    extras = doctor(capsys)["extras"]
    assert extras["cluster"] == "submitit missing; pip install 'localvit[cluster]'"
    assert extras["parquet"] == "pyarrow 1"
