"""Locality in existing models: plan, apply, report, restore."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.errors import UnsupportedModelError as UnsupportedModelError
    from localvit.surgery.adapters import (
        Block as Block,
        ModelAdapter as ModelAdapter,
        accepted_classes as accepted_classes,
        register_adapter as register_adapter,
    )
    from localvit.surgery.checking import check_adapter as check_adapter
    from localvit.surgery.confounding import confounders as confounders
    from localvit.surgery.ffns import Ffn as Ffn
    from localvit.surgery.grids import GridFrom as GridFrom
    from localvit.surgery.operation import (
        LOCALIZED as LOCALIZED,
        Localization as Localization,
        RestoreError as RestoreError,
        localize as localize,
        restore as restore,
    )
    from localvit.surgery.parameters import locality_parameters as locality_parameters
    from localvit.surgery.placement import BlockSpec as BlockSpec, select_blocks as select_blocks
    from localvit.surgery.preview import (
        Plan as Plan,
        SitePlan as SitePlan,
        plan as plan,
        plan_changes as plan_changes,
        refuse_wrapped as refuse_wrapped,
    )
    from localvit.surgery.recipe import Recipe as Recipe
    from localvit.surgery.supported import (
        SupportEntry as SupportEntry,
        scan_supported as scan_supported,
        supported_document as supported_document,
        supported_models as supported_models,
        supported_table as supported_table,
        timm_architectures as timm_architectures,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
