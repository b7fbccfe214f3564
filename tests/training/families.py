"""One small model of each family of the paper, and what the reference excludes from weight decay."""

from typing import Any, NamedTuple


class Family(NamedTuple):
    """A family.

    `args` make it small. `no_decay` are the names, besides biases and 1-D parameters, that the authors of
    LocalViT do not decay (their models' `no_weight_decay`, read by timm 0.3.2). `decayed` is one that they
    do decay and that is easily thought not to be.
    """

    model: str
    args: dict[str, Any]
    no_decay: set[str]
    decayed: str


FAMILIES = {
    "deit_imagenet": Family(
        "deit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        {"pos_embed", "cls_token"},
        "patch_embed.proj.weight",
    ),
    "distill_deit": Family(
        "deit_tiny_distilled_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        {"pos_embed", "cls_token"},
        "dist_token",
    ),
    "swin_imagenet": Family(
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
        },
        set(),
        "layers.0.blocks.0.attn.relative_position_bias_table",
    ),
    "tnt_imagenet": Family(
        "tnt_s_legacy_patch16_224",
        {
            "img_size": 32,
            "embed_dim": 32,
            "inner_dim": 8,
            "depth": 1,
            "num_heads_outer": 2,
            "num_heads_inner": 2,
        },
        {"patch_pos", "pixel_pos", "cls_token"},
        "pixel_embed.proj.weight",
    ),
    "pvt_imagenet": Family(
        "pvt_tiny",
        {"img_size": 64, "embed_dims": [8, 16, 20, 32], "depths": [1, 1, 1, 1]},
        {"cls_token"},
        "stages.0.pos_embed",
    ),
    "t2t_imagenet": Family(
        "t2t_vit_7",
        {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "token_dim": 16},
        {"cls_token"},
        "head.weight",
    ),
}
SHRUNK = {
    **{recipe: family.args for recipe, family in FAMILIES.items()},
    "swin_imagenet_authors": FAMILIES["swin_imagenet"].args,
    "t2t_imagenet_authors": FAMILIES["t2t_imagenet"].args,
    "small_images": {"embed_dim": 16, "depth": 1},
    "small_images_quick": {"embed_dim": 16, "depth": 1},
    "digits": {"embed_dim": 16, "depth": 1},
    "finetune": FAMILIES["deit_imagenet"].args,
}
"""Recipe -> `model.args` of a model that trains in a moment."""
