"""Reasons why classes of timm's models are not localized, by the module of timm that defines them."""

_CONVOLUTIONS = "it is a convolutional network, without the feed-forward networks of a transformer"
_DEPTHWISE = "its point-wise layers stand behind a depth-wise convolution in each block already"
_INVERTED = "its feed-forward networks are inverted residuals, which have a depth-wise convolution already"

_MODULES = {
    _CONVOLUTIONS: """byoanet cspnet cspnext densenet dla dpn efficientnet fasternet ghostnet hardcorenas
        hgnet hrnet inception_resnet_v2 inception_v3 inception_v4 lcnetv2 mobilenetv3
        mobilenetv5 nasnet nfnet pnasnet regnet repghost res2net resnest resnet resnetv2 rexnet
        selecsls senet sknet tresnet vgg vovnet xception xception_aligned""",
    _DEPTHWISE: "convmixer convnext inception_next mambaout rdnet repvit starnet",
    _INVERTED: "cpubone efficientvit_mit lowformer",
}
REASONS = {module: reason for reason, modules in _MODULES.items() for module in modules.split()} | {
    "iformer": "its feed-forward networks contain their residual branch, LayerScale and drop-path",
    "mlp_mixer": "its blocks mix tokens by linear layers over fixed positions, not by attention",
    "sequencer": "its blocks mix tokens by recurrent networks, not by attention",
}
"""Module of timm (`"resnet"`) -> reason why its models are refused."""
