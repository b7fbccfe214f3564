"""Locality in a feed-forward network. Imports torch, timm.layers and localvit.errors only."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.locality.config import OLDER_VALUES as OLDER_VALUES, LocalityConfig as LocalityConfig
    from localvit.locality.feed_forward import (
        HiddenLocality as HiddenLocality,
        LocalityFeedForward as LocalityFeedForward,
    )
    from localvit.locality.grid import (
        Grid as Grid,
        GridRecord as GridRecord,
        TokenOrder as TokenOrder,
        check_grid as check_grid,
        from_raster_order as from_raster_order,
        given_grid as given_grid,
        map_to_tokens as map_to_tokens,
        set_accelerator as set_accelerator,
        statistics_once as statistics_once,
        to_raster_order as to_raster_order,
        tokens_to_map as tokens_to_map,
        tokens_to_row as tokens_to_row,
    )
    from localvit.locality.layers import HardSigmoid as HardSigmoid, Pointwise as Pointwise
    from localvit.locality.presets import PRESETS as PRESETS, preset as preset
else:
    __getattr__, __dir__, __all__ = door(__name__)
