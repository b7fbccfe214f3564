"""Acceleration: fused models for inference, native kernels, selective checkpointing."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.acceleration.cpu import processor as processor
    from localvit.acceleration.dispatch import accelerated as accelerated
    from localvit.acceleration.fusing.fuse import fuse as fuse
    from localvit.acceleration.fusing.linear import (
        pack as pack,
        packed_available as packed_available,
        packed_linear as packed_linear,
    )
    from localvit.acceleration.memory import set_selective_checkpointing as set_selective_checkpointing
    from localvit.acceleration.native.build import native_status as native_status
else:
    __getattr__, __dir__, __all__ = door(__name__)
