"""Models under a machine's roof: operations per second against operations per byte that is moved."""

from torch import Tensor, strided as dense, zeros
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localvit.bench.measure import Quartiles, Work, interleaved, without_gradients
from localvit.bench.peak import fastest_matmul


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write: those that move if no cache helps. Views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors if tensor.layout is dense)
        return out


def roofline(works: dict[str, tuple[Work, float]], rounds: int) -> dict[str, object]:
    """Measure what the chart needs, on the CPU with the present number of threads.

    Args:
        works: Name -> what to run in PyTorch, and its floating-point operations.
        rounds: Turns of each, of the fastest matrix product and of a large copy.
    """
    source, target = zeros(2, 2**26)
    peak = fastest_matmul(source.device)
    timed = {name: work for name, (work, _) in works.items()}
    timed |= {"peak": without_gradients(peak.work), "copy": lambda: target.copy_(source)}
    seconds = {name: Quartiles.of(taken).median for name, taken in interleaved(timed, rounds).items()}
    points = []
    for name, (work, flops) in works.items():
        with Traffic() as traffic:
            work()
        speed = flops / seconds[name] / 1e9
        points.append({"name": name, "gflops": speed, "flops_per_byte": flops / traffic.bytes})
    return {
        "peak_gflops": peak.flops / seconds["peak"] / 1e9,
        "peak_matmul": peak.words,
        "copy_gb_per_second": 2 * source.nbytes / seconds["copy"] / 1e9,
        "points": points,
    }
