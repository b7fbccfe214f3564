"""Locality for vision transformers: a depth-wise convolution inside the feed-forward network."""

__version__ = "0.1.0"

from .locality import ConfigError as ConfigError
from .locality import Grid as Grid
from .locality import LocalityConfig as LocalityConfig
from .locality import LocalityFeedForward as LocalityFeedForward
from .models import CheckpointError as CheckpointError
from .models import LoadReport as LoadReport
from .models import load_official as load_official
from .surgery import Plan as Plan
from .surgery import Report as Report
from .surgery import RestoreError as RestoreError
from .surgery import UnsupportedModelError as UnsupportedModelError
from .surgery import localize as localize
from .surgery import plan as plan
from .surgery import restore as restore
