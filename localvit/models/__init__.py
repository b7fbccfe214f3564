"""Models by name, and the authors' weights."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.models.build import (
        build_model as build_model,
        check_args as check_args,
        check_forward as check_forward,
        preprocessing_for as preprocessing_for,
    )
    from localvit.models.config import ModelConfig as ModelConfig
    from localvit.models.counting import count as count, heads as heads, names as names
    from localvit.models.delta import (
        add_to_digest as add_to_digest,
        base_digest as base_digest,
        head_parameters as head_parameters,
        load_locality as load_locality,
        save_locality as save_locality,
    )
    from localvit.models.listing import (
        ModelCard as ModelCard,
        ModelEntry as ModelEntry,
        registry as registry,
    )
    from localvit.models.published import (
        CheckpointError as CheckpointError,
        LoadReport as LoadReport,
        load_official as load_official,
        why_unreadable as why_unreadable,
    )
    from localvit.models.table import (
        BASELINES as BASELINES,
        VARIANTS as VARIANTS,
        Published as Published,
        Variant as Variant,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
