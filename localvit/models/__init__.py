"""Names of models, and the authors' weights."""

from .published import CheckpointError as CheckpointError
from .published import LoadReport as LoadReport
from .published import load_official as load_official
from .variants import BASELINES as BASELINES
from .variants import VARIANTS as VARIANTS
from .variants import Published as Published
from .variants import Variant as Variant
