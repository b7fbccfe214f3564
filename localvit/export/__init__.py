"""Export of models to other engines, checked against the original."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.export.checkpoint import export_checkpoint as export_checkpoint
    from localvit.export.parity import (
        BATCHES as BATCHES,
        TOLERANCE as TOLERANCE,
        Parity as Parity,
        ParityCase as ParityCase,
        ParityError as ParityError,
        check_parity as check_parity,
    )
    from localvit.export.write import (
        FORMATS as FORMATS,
        ExportFailed as ExportFailed,
        FormatName as FormatName,
        check_export as check_export,
        export_model as export_model,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
