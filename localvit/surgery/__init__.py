"""The idea put into a model: plan, apply, report, restore."""

from .layouts import UnsupportedModelError as UnsupportedModelError
from .localize import LOCALIZED as LOCALIZED
from .localize import Report as Report
from .localize import RestoreError as RestoreError
from .localize import localize as localize
from .localize import restore as restore
from .placement import BlockSpec as BlockSpec
from .placement import select_blocks as select_blocks
from .plan import Plan as Plan
from .plan import SitePlan as SitePlan
from .plan import plan as plan
