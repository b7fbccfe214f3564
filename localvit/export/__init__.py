"""Models for other engines: written, compared with the original, and opened again."""

from localvit.export.engines import READS, SAFE, Engine, EngineKind, open_engine
from localvit.export.info import ExportInfo
from localvit.export.parity import TOLERANCE, Parity, ParityCase, ParityError, check_parity
from localvit.export.write import FORMATS, ExportFailed, FormatName, check_export, export_model

__all__ = [
    "FORMATS",
    "READS",
    "SAFE",
    "TOLERANCE",
    "Engine",
    "EngineKind",
    "ExportFailed",
    "ExportInfo",
    "FormatName",
    "Parity",
    "ParityCase",
    "ParityError",
    "check_export",
    "check_parity",
    "export_model",
    "open_engine",
]
