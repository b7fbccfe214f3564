"""What must be known to use an exported model: how pictures are prepared, and what its outputs mean."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from localvit.data import Preprocessing
from localvit.errors import ConfigError
from localvit.version import __version__

KEY = "localvit"
"""Under which every format keeps it: ONNX ``metadata_props``, OpenVINO ``rt_info``, a file in a ``.pt2``."""

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True, kw_only=True)
class ExportInfo(Preprocessing):
    """What goes into the file besides the model, as JSON, so that a user needs nothing else.

    Attributes:
        architecture: Name for ``timm.create_model``, for people.
        num_classes: Number of outputs.
        labels: Label of each output as the training data named it, if known.
        descriptions: What a person calls each, if known.
        size_step: Heights and widths may be any multiples of this; ``None``: `input_size` only.
        made_with: Versions of what wrote the file.
    """

    architecture: str
    num_classes: int
    labels: tuple[str, ...] | None = None
    descriptions: tuple[str, ...] | None = None
    size_step: int | None = None
    made_with: str = ""

    @classmethod
    def of(
        cls,
        preprocessing: Preprocessing,
        *,
        architecture: str,
        num_classes: int,
        labels: tuple[str, ...] | None = None,
        descriptions: tuple[str, ...] | None = None,
    ) -> ExportInfo:
        """Describe a model that takes images prepared by `preprocessing`."""
        import torch

        return cls(
            architecture=architecture,
            **{field.name: getattr(preprocessing, field.name) for field in dataclasses.fields(Preprocessing)},
            num_classes=num_classes,
            labels=labels,
            descriptions=descriptions,
            made_with=f"localvit {__version__}, torch {torch.__version__.partition('+')[0]}",
        )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The configured size, and where sizes are free a larger one that is not square."""
        _, height, width = self.input_size
        if self.size_step is None:
            return ((height, width),)
        return ((height, width), (height + self.size_step, width + 2 * self.size_step))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, file: str) -> ExportInfo:
        """Read what `to_json` wrote. The file may be anyone's, so every value is looked at.

        Args:
            text: JSON.
            file: For the message.

        Raises:
            ConfigError: if there is none, or a value is not what it must be.
        """
        try:
            values = json.loads(text)
            made: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
                if name in {field.name for field in dataclasses.fields(cls)}  # a later version has more
            }
            info = cls(**made)
            info._check()
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(f"{file!r} is not of localvit export, or damaged: {error}") from error
        return info

    def _check(self) -> None:
        channels = self.input_size[0]
        names = [names for names in (self.labels, self.descriptions) if names is not None]
        good = (
            len(self.input_size) == 3
            and all(isinstance(side, int) and 0 < side < 2**16 for side in self.input_size)
            and len(self.mean) == len(self.std) == channels
            and all(math.isfinite(value) for value in self.mean)
            and all(value > 0 for value in self.std)
            and self.interpolation in ("nearest", "bilinear", "bicubic", "lanczos", "random")
            and self.crop_mode in ("center", "squash", "border")
            and 0 < self.crop_pct <= 2
            and all(len(each) == self.num_classes for each in names)
            and all(isinstance(name, str) for each in names for name in each)
        )
        if not good:
            raise ValueError(f"its {KEY!r} entry has values that cannot be")
