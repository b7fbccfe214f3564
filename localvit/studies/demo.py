"""The question of the demo as a study: a small DeiT, and the same DeiT with the paper's locality."""

from __future__ import annotations

from localvit.config import TrainConfig
from localvit.errors import ConfigError
from localvit.locality import LocalityConfig
from localvit.studies.design import Arm, Study
from localvit.studies.execution import Tuning

QUESTION = "Does locality in the feed-forward networks help this vision transformer?"
ARMS = (
    Arm(name="baseline", changes={"model.locality": None}),
    Arm(name="locality", changes={"model.locality": LocalityConfig().to_dict()}),
)
"""The control, and the treatment; they differ in this field and in the learning rate tuned for each."""


def demo_study(base: TrainConfig, seeds: int, tuning: Tuning | None) -> Study:
    """The comparison with seeds 0, 1, ...

    Args:
        base: What both arms share.
        seeds: How many, at least 2: one pair has no spread to judge a difference by.
        tuning: Of both learning rates; ``None`` leaves the base's to both.

    Raises:
        ConfigError: for fewer than two seeds.
    """
    if seeds < 2:
        raise ConfigError(f"seeds={seeds}: at least 2 are needed to compare")
    rates = tuning.chosen if tuning else {}
    arms = tuple(
        Arm(name=arm.name, changes=arm.changes | {"optim.lr": rates.get(arm.name, base.optim.lr)})
        for arm in ARMS
    )
    return Study(question=QUESTION, base=base, arms=arms, seeds=tuple(range(seeds)), name="demo")
