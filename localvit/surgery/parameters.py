"""Which parameters of a model are locality's."""

from torch import nn

from localvit.locality import HiddenLocality, LocalityFeedForward


def locality_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that locality added to a model, by name, in the model's order.

    After `init="paper"` these are all of the new feed-forward networks, which replace the old ones; after
    `init="preserve"` the depth-wise kernels, not the layers that they were put into. A model by name
    (`localvit_tiny_patch16_224`) has the same as its baseline would have after `localvit.localize`.

    Args:
        model: Any model. One without locality has none.
    """
    added: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, (LocalityFeedForward, HiddenLocality)):
            prefix = f"{path}." if path else ""
            # `then` is the layer of the original network that the convolution stands in front of.
            added |= {prefix + n for n, _ in module.named_parameters() if not n.startswith("then.")}
    return [(name, parameter) for name, parameter in model.named_parameters() if name in added]
