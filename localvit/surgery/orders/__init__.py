"""Orders of tokens other than `(B, P + N, C)` in raster order: each a pair of inverse views.

Letters: B images, N tokens, C channels, H rows, W columns.
"""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.surgery.orders.maps import ChannelsFirst as ChannelsFirst, ChannelsLast as ChannelsLast
    from localvit.surgery.orders.strided import Strided as Strided
    from localvit.surgery.orders.windows import Windows as Windows
else:
    __getattr__, __dir__, __all__ = door(__name__)
