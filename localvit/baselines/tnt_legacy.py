"""TNT-Ti, the size of TNT that timm lacks, as the LocalViT paper uses it.

The model is timm's `TNT` with `legacy=True`: each pixel is normalised by itself before the projection to its
patch. (`legacy=False`, timm's `tnt_s_patch16_224`, computes another function.)
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.tnt import TNT, checkpoint_filter_fn

__all__ = ["tnt_t_legacy_patch16_224"]

default_cfgs = generate_default_cfgs(
    {
        "tnt_t_legacy_patch16_224": {  # evaluated by the defaults of timm's PretrainedCfg
            "url": "",
            "fixed_input_size": True,
            "first_conv": "pixel_embed.proj",
            "classifier": "head",
            "paper_ids": "arXiv:2103.00112",
            "license": "apache-2.0",
        }
    }
)


@register_model
def tnt_t_legacy_patch16_224(pretrained: bool = False, **kwargs: Any) -> TNT:
    """Create TNT-Ti: width 192, pixel width 12, 3 heads in each (ofsoundof/LocalViT models/tnt.py)."""
    sizes = {"patch_size": 16, "embed_dim": 192, "inner_dim": 12, "num_heads_outer": 3, "num_heads_inner": 3}
    return build_model_with_cfg(
        TNT,
        "tnt_t_legacy_patch16_224",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**sizes, "depth": 12, "qkv_bias": False, "legacy": True, **kwargs},
    )
