"""Data sets as three disjoint splits, and batches that depend on the seed alone."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.data.config import (
        AugmentConfig as AugmentConfig,
        DataConfig as DataConfig,
        DataError as DataError,
        Preprocessing as Preprocessing,
    )
    from localvit.data.ghostscript import disable_ghostscript as disable_ghostscript
    from localvit.data.identity import file_reader as file_reader, image_name as image_name
    from localvit.data.images import (
        Images as Images,
        Part as Part,
        Sample as Sample,
        UnreadableImage as UnreadableImage,
        decode as decode,
    )
    from localvit.data.listing import check_regular as check_regular, list_files as list_files
    from localvit.data.loading import (
        Batch as Batch,
        derive_seed as derive_seed,
        eval_loader as eval_loader,
        random_scope as random_scope,
        readable as readable,
        seed_all as seed_all,
        share as share,
        train_loader as train_loader,
    )
    from localvit.data.manifest import (
        Manifest as Manifest,
        make_manifest as make_manifest,
        split_record as split_record,
    )
    from localvit.data.order import name_order as name_order
    from localvit.data.overlap import equal_contents as equal_contents, shared as shared
    from localvit.data.sources import find_splits as find_splits
    from localvit.data.splits import (
        Splits as Splits,
        open_splits as open_splits,
        open_test_split as open_test_split,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
