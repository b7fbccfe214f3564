"""Recipe of a localization: what a file needs to repeat it on the base."""

from dataclasses import dataclass
from typing import Self

from torch import nn

from localvit.locality import LocalityConfig
from localvit.surgery.operation import Localization


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Surgery that makes the localized model from its base.

    Attributes:
        locality: Configuration of the chosen blocks.
        blocks: Their indices.
        also: Configurations of further groups (see `localize`).
    """

    locality: LocalityConfig
    blocks: tuple[int, ...]
    also: dict[str, LocalityConfig]

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Return the recipe of a localized model; `None` for any other model."""
        done = getattr(model, "localization", None)
        if not isinstance(done, Localization):
            return None
        plan = done.plan
        also = {group: config.resolve() for group, config in plan.also.items()}
        return cls(locality=plan.config.resolve(), blocks=plan.blocks, also=also)
