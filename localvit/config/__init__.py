"""Schema of a run, its recipes, and the comparison of two configurations."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.config.comparison import (
        UNCOMPARED as UNCOMPARED,
        ConfigDiff as ConfigDiff,
        check_allowed as check_allowed,
        differences as differences,
        identity_fields as identity_fields,
        refuse_changes as refuse_changes,
    )
    from localvit.config.files import (
        list_recipes as list_recipes,
        load_recipe as load_recipe,
        merge as merge,
        parse_setting as parse_setting,
        read_config as read_config,
        resolve as resolve,
    )
    from localvit.config.older import from_older as from_older, to_older as to_older
    from localvit.config.schema import (
        DistillConfig as DistillConfig,
        EngineConfig as EngineConfig,
        OptimConfig as OptimConfig,
        Precision as Precision,
        ScheduleConfig as ScheduleConfig,
        TrainConfig as TrainConfig,
        TrainOnly as TrainOnly,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
