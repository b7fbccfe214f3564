"""Study of the demo: a small DeiT with and without the paper's locality."""

from __future__ import annotations

from localvit.config import TrainConfig
from localvit.locality import LocalityConfig
from localvit.studies.design import Arm, Study
from localvit.studies.execution import Tuning

QUESTION = "Does locality in the feed-forward networks help this vision transformer?"
ARMS = (
    Arm(name="baseline", changes={"model.locality": None}),
    Arm(name="locality", changes={"model.locality": LocalityConfig().to_dict()}),
)
"""Control and treatment; they differ in this field and in the tuned learning rate."""


def demo_study(base: TrainConfig, seeds: int, tuning: Tuning | None) -> Study:
    """Return the study with seeds 0, 1, ...

    Args:
        base: Configuration of both arms.
        seeds: Number of seeds.
        tuning: Tuning of both learning rates; `None` keeps that of the base.
    """
    rates = tuning.chosen if tuning else {}
    arms = tuple(
        Arm(name=arm.name, changes=arm.changes | {"optim.lr": rates.get(arm.name, base.optim.lr)})
        for arm in ARMS
    )
    return Study(question=QUESTION, base=base, arms=arms, seeds=tuple(range(seeds)), name="demo")
