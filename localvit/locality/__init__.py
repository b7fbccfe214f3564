"""The idea: locality in a feed-forward network. Imports torch and timm.layers only."""

from .config import ConfigError as ConfigError
from .config import LocalityConfig as LocalityConfig
from .feed_forward import HiddenLocality as HiddenLocality
from .feed_forward import LocalityFeedForward as LocalityFeedForward
from .grid import Grid as Grid
from .grid import GridRecord as GridRecord
from .grid import map_to_tokens as map_to_tokens
from .grid import tokens_to_map as tokens_to_map
