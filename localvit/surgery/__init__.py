"""The idea put into a model: plan, apply, report, restore."""

from localvit.surgery.confounders import confounders
from localvit.surgery.layouts import UnsupportedModelError
from localvit.surgery.localize import LOCALIZED, Report, RestoreError, localize, restore
from localvit.surgery.parameters import locality_parameters
from localvit.surgery.placement import BlockSpec, select_blocks
from localvit.surgery.plan import Plan, SitePlan, plan

__all__ = [
    "LOCALIZED",
    "BlockSpec",
    "Plan",
    "Report",
    "RestoreError",
    "SitePlan",
    "UnsupportedModelError",
    "confounders",
    "locality_parameters",
    "localize",
    "plan",
    "restore",
    "select_blocks",
]
