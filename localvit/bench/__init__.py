"""How fast a model is here: timed in turns with another, as a ratio and as a share of the machine's peak."""

from localvit.bench.comparison import BenchConfig, compare
from localvit.bench.engines import EngineName
from localvit.bench.measure import Quartiles, interleaved, ratio
from localvit.bench.peak import fastest_matmul
from localvit.bench.result import Comparison, Setting, Side

__all__ = [
    "BenchConfig",
    "Comparison",
    "EngineName",
    "Quartiles",
    "Setting",
    "Side",
    "compare",
    "fastest_matmul",
    "interleaved",
    "ratio",
]
