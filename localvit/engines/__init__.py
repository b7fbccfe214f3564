"""Exported files, opened by the engine that runs them."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.engines.info import KEY as KEY, ExportInfo as ExportInfo, Size as Size
    from localvit.engines.open import (
        ENGINE_NAMES as ENGINE_NAMES,
        READS as READS,
        EngineKind as EngineKind,
        ExportedModel as ExportedModel,
        check_packages as check_packages,
        open_engine as open_engine,
        pick_engine as pick_engine,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
