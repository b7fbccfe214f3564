import pytest
import torch
from torch import nn

from localvit.cost import count_macs, on_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_counting_takes_any_dtype(dtype, default):
    model = nn.Conv2d(3, 4, 3, bias=False).to(dtype)
    torch.set_default_dtype(default)
    try:
        assert count_macs(model, (3, 5, 5)) == 4 * 9 * 27
    finally:
        torch.set_default_dtype(torch.float32)


def test_building_for_counting_leaves_other_devices_their_values():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3).normal_())
            self.register_buffer("table", torch.zeros(2, device="cpu").fill_(2.0))

    torch.manual_seed(0)
    expected = torch.randn(1)
    torch.manual_seed(0)
    model = on_meta(Model)
    assert model.weight.is_meta
    assert model.table.tolist() == [2.0, 2.0]
    assert torch.equal(torch.randn(1), expected)  # no random numbers were used
