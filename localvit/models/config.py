"""Configuration of a model, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from localvit.errors import ConfigError
from localvit.locality import LocalityConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Choice of a model; control and treatment of a comparison differ in `locality` only.

    Attributes:
        name: Any name of `timm.create_model`.
        locality: Locality of the feed-forward networks; `None`: the plain model. In a file or a setting,
            `preset` names a published design, and the other fields change it.
        blocks: Blocks with locality: `"all"`, `"lower-half"`, `"lower-third"`, `"middle-third"`,
            `"upper-third"`, a list of indices, or a list of `[start, stop]` pairs.
        pretrained: Start from published weights.
        args: Further arguments of `timm.create_model` (`img_size`, `patch_size`, `in_chans`, `embed_dim`,
            `depth`, `num_heads`, `drop_path_rate`, ...). By default, `num_classes` comes from the data.
            `checkpoint_path` is a file with weights of the plain or of the localized model.
    """

    name: str = "deit_tiny_patch16_224"
    locality: LocalityConfig | None = None
    blocks: str | list[Any] = "all"
    pretrained: bool = False
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.locality is None and self.blocks != "all":
            raise ConfigError(
                f"model.blocks={self.blocks!r} has no effect without model.locality; set both or neither"
            )
