"""Speed of a model on this machine: against another model, and as a fraction of the peak."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.bench.comparison import BenchConfig as BenchConfig, compare as compare
    from localvit.bench.diagnosis import diagnose as diagnose
    from localvit.bench.engines import EngineName as EngineName
    from localvit.bench.host import (
        forget_peak_memory as forget_peak_memory,
        machine as machine,
        peak_memory as peak_memory,
    )
    from localvit.bench.measure import (
        Quartiles as Quartiles,
        interleaved as interleaved,
        ratio as ratio,
        timer_for as timer_for,
        using_threads as using_threads,
        without_gradients as without_gradients,
    )
    from localvit.bench.peak import fastest_matmul as fastest_matmul
    from localvit.bench.result import Comparison as Comparison, Setting as Setting, Side as Side
else:
    __getattr__, __dir__, __all__ = door(__name__)
