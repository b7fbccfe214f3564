"""Parameters that locality adds to a model."""

from torch import nn

from localvit.locality import HiddenLocality, LocalityFeedForward


def locality_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters that locality added to a model, in the model's order.

    After `init="paper"` these are all parameters of the new feed-forward networks; after `init="preserve"`
    they are the depth-wise kernels only. A model by name (`localvit_tiny_patch16_224`) has the same ones as
    its baseline after `localvit.localize`.

    Args:
        model: Any model; the list is empty for one without locality.
    """
    added: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, (LocalityFeedForward, HiddenLocality)):
            prefix = f"{path}." if path else ""
            # `then` is the layer of the original network that follows the convolution.
            added |= {prefix + n for n, _ in module.named_parameters() if not n.startswith("then.")}
    return [(name, parameter) for name, parameter in model.named_parameters() if name in added]
