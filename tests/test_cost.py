import torch
from torch import nn

from localvit.cost import on_meta


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
