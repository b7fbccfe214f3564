"""Metadata of an exported model: preparation of its images and names of its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from localvit.data import Preprocessing
from localvit.errors import ConfigError
from localvit.structure import build, parse_json, to_json
from localvit.version import __version__

KEY = "localvit"
"""Key of the metadata in every format: ONNX `metadata_props`, OpenVINO `rt_info`, a file in a `.pt2`."""

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True, kw_only=True)
class ExportInfo(Preprocessing):
    """Metadata in the file, as JSON, so that a user needs nothing else.

    Attributes:
        architecture: Name for `timm.create_model`, for information.
        num_classes: Number of outputs.
        labels: Label of each output as the training data named it, if known.
        descriptions: Readable name of each label, if known.
        size_step: Step of heights and widths; `None` for `input_size` only.
        made_with: Versions of the packages that wrote the file.
    """

    architecture: str
    num_classes: int
    labels: tuple[str, ...] | None = None
    descriptions: tuple[str, ...] | None = None
    size_step: int | None = None
    made_with: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("labels", "descriptions"):
            names = getattr(self, name)
            if names is not None and len(names) != self.num_classes:
                raise ConfigError(f"{name}={names!r} does not fit the other values; export again")

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
            **dataclasses.asdict(preprocessing),
            architecture=architecture,
            num_classes=num_classes,
            labels=labels,
            descriptions=descriptions,
            made_with=f"localvit {__version__}, torch {torch.__version__.partition('+')[0]}",
        )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The configured size, and a larger, non-square one if sizes are free."""
        _, height, width = self.input_size
        if self.size_step is None:
            return ((height, width),)
        return ((height, width), (height + self.size_step, width + 2 * self.size_step))

    def to_json(self) -> str:
        return to_json(self, indent=None)

    @classmethod
    def from_json(cls, text: str, file: str) -> ExportInfo:
        """Read the text of `to_json`; fields of later versions are left out.

        Args:
            text: JSON.
            file: Name for the message.

        Raises:
            ConfigError: if the text is missing or invalid.
        """
        try:
            values = parse_json(text)
            names = {field.name for field in dataclasses.fields(cls)}
            known = isinstance(values, Mapping) and {k: v for k, v in values.items() if k in names}
            return build(cls, known)
        except ConfigError as error:
            raise ConfigError(
                f"{file!r} was not written by localvit export, or is damaged: {error}; export again"
            ) from error
