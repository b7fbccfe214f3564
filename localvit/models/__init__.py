"""Names of models, and the authors' weights."""

from localvit.models import variants  # noqa: F401 (registers the names with timm)
from localvit.models.listing import Card, Entry, card, catalogue
from localvit.models.published import CheckpointError, LoadReport, load_official
from localvit.models.table import BASELINES, VARIANTS, Published, Variant

__all__ = [
    "BASELINES",
    "VARIANTS",
    "Card",
    "CheckpointError",
    "Entry",
    "LoadReport",
    "Published",
    "Variant",
    "card",
    "catalogue",
    "load_official",
]
