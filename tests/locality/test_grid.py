import copy
import pickle

import torch
from hypothesis import given, strategies as st
from torch import nn

from localvit.locality.grid import Grid, GridRecord, map_to_tokens, tokens_to_map

_SMALL = st.integers(1, 5)


def test_raster_order_by_hand():
    tokens = torch.arange(7.0).reshape(1, 7, 1)  # token 0 is a prefix token, then rows of 3
    assert tokens_to_map(tokens, Grid(2, 3, 1))[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


@given(batch=_SMALL, height=_SMALL, width=_SMALL, channels=_SMALL, prefix=st.integers(0, 3))
def test_the_two_views_are_inverse(batch, height, width, channels, prefix):
    tokens = torch.randn(batch, prefix + height * width, channels)
    feature_map = tokens_to_map(tokens, Grid(height, width, prefix))
    assert feature_map.shape == (batch, channels, height, width)
    assert torch.equal(map_to_tokens(feature_map), tokens[:, prefix:])


def test_nothing_is_copied_and_the_map_is_channels_last():
    tokens = torch.randn(2, 12, 8)
    feature_map = tokens_to_map(tokens, Grid(3, 4))
    assert feature_map.data_ptr() == tokens.data_ptr()
    assert feature_map.is_contiguous(memory_format=torch.channels_last)
    assert map_to_tokens(feature_map).data_ptr() == tokens.data_ptr()


class _Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grid_size = (2, 3)
        self.record = GridRecord(self)


def test_a_copied_or_pickled_record_is_unset_and_belongs_to_the_copy():
    owner = _Owner()
    owner.record.size = (5, 7)
    for clone in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert clone.record.size is None
        assert clone.record.source is clone
        assert clone.record.static_size == (2, 3)
    assert owner.record.size == (5, 7)


def test_a_record_without_source_has_no_static_size():
    assert GridRecord().static_size == (0, 0)
