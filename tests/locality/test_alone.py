"""The room imports torch, timm.layers and localvit.errors only, and works with all other rooms deleted."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from localvit import Grid, LocalityConfig, LocalityFeedForward
from localvit.locality import feed_forward, grid
from localvit.locality.feed_forward import HiddenLocality

PACKAGE = Path(__file__).parents[2] / "localvit"
CODE = """
import sys, torch
from localvit.locality import PRESETS, Grid, LocalityFeedForward
for config in PRESETS.values():
    ffn = LocalityFeedForward(8, config)
    ffn(torch.randn(2, 13, 8), Grid(3, 4, 1)).sum().backward()
    assert ffn.conv.weight.grad is not None
print(sorted(name for name in sys.modules if name.startswith("localvit")))
"""


def test_it_trains_with_all_other_rooms_deleted(tmp_path):
    (tmp_path / "localvit").mkdir()
    (tmp_path / "localvit" / "__init__.py").touch()
    for name in ("errors.py", "imports.py"):
        shutil.copy(PACKAGE / name, tmp_path / "localvit")
    shutil.copytree(PACKAGE / "locality", tmp_path / "localvit" / "locality")
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{CODE}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rooms = {name.split(".")[1] for name in ast.literal_eval(done.stdout) if "." in name}
    assert rooms == {"errors", "imports", "locality"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "locality").glob("*.py")), ids=lambda path: path.name)
def test_what_it_imports(path):
    allowed = ("torch", "timm.layers", "localvit.errors", "localvit.imports", "localvit.locality")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            ours = any(name == root or name.startswith(f"{root}.") for root in allowed)
            assert ours or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


# --- shapes: a docstring `(B, T, C) -> (B, T, D)` says what goes in and comes out ---------------------------

FUNCTIONS = [grid.tokens_to_map, grid.map_to_tokens, grid.tokens_to_row, grid.after_prefix]
METHODS = [
    *(getattr(LocalityFeedForward, name) for name in ("forward", "transform", "expand", "mix", "project")),
    *(getattr(HiddenLocality, name) for name in ("forward", "transform")),
]


def shapes_in(docstring: str) -> tuple[list[str], str]:
    """Return the shapes before and after the arrow."""
    one_line = " ".join(docstring.split())
    before, after = re.search(r"`+(\([^`]*\)) -> (\([^`]*\))`+", one_line).groups()
    return re.findall(r"\((.*?)\)", before), after[1:-1]


def unify(shape: str, actual: tuple[int, ...], letters: dict[str, int]) -> None:
    """Check a shape such as `B, P + N, C`; a letter that is new takes the value that it meets."""
    dimensions = [d.strip() for d in shape.split(",")]
    assert len(dimensions) == len(actual), f"({shape}) is not {actual}"
    for dimension, size in zip(dimensions, actual, strict=True):
        choices = [re.sub(r"(\d) ([A-Z])", r"\1 * \2", choice) for choice in dimension.split(" or ")]
        if len(choices) == 1 and choices[0].isidentifier():
            assert letters.setdefault(choices[0], size) == size, f"{dimension} of ({shape}) is not {size}"
        else:
            assert size in [eval(choice, {}, dict(letters)) for choice in choices], (
                f"({shape}) is not {actual}"
            )


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """Names of functions whose shapes were compared with their docstrings from now on."""
    seen: list[str] = []

    def wrap(owner: object, name: str) -> None:
        function = getattr(owner, name)
        inputs, output = shapes_in(function.__doc__)

        def checking(*args, **kwargs):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            grids = [a for a in (*args, *kwargs.values()) if isinstance(a, Grid)]
            letters = (
                {"H": g.height, "W": g.width, "N": g.height * g.width, "P": g.num_prefix_tokens}
                if (g := grids[0] if grids else None)
                else {}
            )
            if args and isinstance(args[0], LocalityFeedForward):
                letters |= {"C": args[0].fc1.in_channels, "D": args[0].fc2.in_channels}
            for shape, tensor in zip(inputs, tensors, strict=True):
                unify(shape, tuple(tensor.shape), letters)
            result = function(*args, **kwargs)
            unify(output, tuple(result.shape), letters)
            seen.append(name)
            return result

        monkeypatch.setattr(owner, name, checking)

    for function in FUNCTIONS:
        wrap(feed_forward if hasattr(feed_forward, function.__name__) else grid, function.__name__)
    for method in METHODS:
        wrap(
            LocalityFeedForward if "LocalityFeedForward" in method.__qualname__ else HiddenLocality,
            method.__name__,
        )
    return seen


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "config",
    [
        LocalityConfig(),
        LocalityConfig(prefix="pointwise", gate="eca"),
        LocalityConfig(glu="both", prefix="identity"),
        LocalityConfig(glu="gate", prefix="pointwise"),
        LocalityConfig(position="first", prefix="pointwise"),
    ],
    ids=str,
)
def test_shapes_in_docstrings(checked, config, prefix):
    ffn = LocalityFeedForward(6, config, hidden_dim=9).double()
    ffn(torch.randn(2, prefix + 12, 6, dtype=torch.float64), Grid(3, 4, prefix))
    assert {"forward", "transform", "expand", "mix", "project", "tokens_to_map", "tokens_to_row"} <= set(
        checked
    )


def test_shapes_in_docstrings_of_the_added_convolution(checked):
    hidden = HiddenLocality(5, torch.nn.Identity(), LocalityConfig(init="preserve"))
    hidden(torch.randn(2, 13, 5), Grid(3, 4, 1))
    assert {"forward", "transform", "after_prefix"} <= set(checked)


@given(st.integers(1, 9), st.integers(1, 9))
def test_the_check_of_shapes_can_fail(size, other):
    unify("B, P + N, 2 C", (size, 3, 2 * other), {"P": 1, "N": 2, "C": other})
    with pytest.raises(AssertionError):
        unify("B, B", (size, size + other), {})
    with pytest.raises(AssertionError):
        unify("B, 2 C", (size, 2 * other + 1), {"C": other})
