"""The smallest run that still learns something."""

import pytest

from localvit.config.files import resolve

TINY = [
    "model.args.embed_dim=16",
    "model.args.depth=2",
    "model.args.num_heads=2",
    "epochs=2",
    "batch_size=128",
    "schedule.warmup_epochs=1",
    "device=cpu",
]


@pytest.fixture
def tiny():
    """A function from settings to a configuration that trains in about a second."""
    return lambda *settings: resolve("digits", [*TINY, *settings])
