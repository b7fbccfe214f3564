"""Plain transformers of the paper that timm lacks; importing a module registers its names with timm."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.baselines.pvt import PyramidVisionTransformer as PyramidVisionTransformer
    from localvit.baselines.pvt_stage import Block as Block
    from localvit.baselines.t2t_vit import T2TViT as T2TViT
else:
    __getattr__, __dir__, __all__ = door(__name__)
