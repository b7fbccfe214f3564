"""Facts that a bug report needs: versions, processor, compiler, native kernels, GPU, extras."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from pathlib import Path

import torch

from localvit.acceleration import native_status, processor
from localvit.bench.host import allocator, cpus, environment
from localvit.errors import first_line
from localvit.runtime import commit, versions

_PACKAGES = ("torchvision", "numpy", "pillow", "safetensors", "huggingface-hub", "pydantic", "PyYAML")
_REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*;.*extra == ["'](\w+)["']""")


def diagnose() -> dict[str, dict[str, str]]:
    """Return section -> fact -> its value in words. Compiles the native kernels if they are not there yet."""
    packages = versions() | {name: _version(name) or "missing" for name in _PACKAGES}
    packages["localvit"] += f", {Path(__file__).parents[1]}, commit {commit() or 'unknown'}"
    return {
        "versions": packages,
        "system": {
            "platform": platform.platform(),
            "python": sys.executable,
            "allocator": allocator(),
            "environment": ", ".join(f"{name}={value}" for name, value in environment().items()) or "-",
        },
        "processor": {
            "name": processor("model name") or platform.processor() or platform.machine(),
            "features": f"{torch.backends.cpu.get_cpu_capability()} (PyTorch), {_features()}",
            "processors": f"{cpus()}, {torch.get_num_threads()} threads (PyTorch)",
        },
        "native kernels": native_status(),
        "gpu": _gpus(),
        "extras": _extras(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _features() -> str:
    flags = (processor("flags") or processor("Features") or "").split()
    wanted = re.compile(r"avx\w*|amx\w*|fma|f16c|asimd\w*|sve\w*|bf16|i8mm")
    return " ".join(filter(wanted.fullmatch, flags)) or "unknown to this system"


def _gpus() -> dict[str, str]:
    if torch.version.cuda is None:
        return {"cuda": "PyTorch is built without it"}
    try:
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        return {"cuda": f"{torch.version.cuda}, not usable: {first_line(error)}"}
    gpus = {f"cuda:{i}": f"{gpu.name}, {gpu.total_memory >> 20} MiB" for i, gpu in enumerate(found)}
    return {"cuda": f"{torch.version.cuda}, {len(found)} GPUs", **gpus}


def _extras() -> dict[str, str]:
    """Return extra -> its packages with their versions."""
    try:
        requirements = importlib.metadata.requires("localvit") or []
    except importlib.metadata.PackageNotFoundError:
        return {"unknown": "localvit is not installed; it runs from a folder"}
    extras: dict[str, list[str]] = {}
    for found in filter(None, map(_REQUIREMENT.match, requirements)):
        if found[2] not in ("dev", "all"):
            extras.setdefault(found[2], []).append(f"{found[1]} {_version(found[1]) or 'missing'}")
    return {
        extra: ", ".join(packages)
        + (f"; pip install 'localvit[{extra}]'" if "missing" in str(packages) else "")
        for extra, packages in extras.items()
    }
