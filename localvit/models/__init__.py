"""Names of models, and the authors' weights."""

from localvit.models.catalogue import Entry, catalogue
from localvit.models.published import CheckpointError, LoadReport, load_official
from localvit.models.variants import BASELINES, VARIANTS, Published, Variant

__all__ = [
    "BASELINES",
    "VARIANTS",
    "CheckpointError",
    "Entry",
    "LoadReport",
    "Published",
    "Variant",
    "catalogue",
    "load_official",
]
