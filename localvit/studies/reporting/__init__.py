"""Statistics, tables and pages of a study."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.studies.reporting.export import (
        compare_studies as compare_studies,
        export_study as export_study,
    )
    from localvit.studies.reporting.rendering import (
        Rendered as Rendered,
        render as render,
        verdicts as verdicts,
        write_report as write_report,
    )
    from localvit.studies.reporting.report import (
        SPEED as SPEED,
        TUNING as TUNING,
        Speed as Speed,
        StudyReport as StudyReport,
        read_report as read_report,
        read_speed as read_speed,
    )
    from localvit.studies.reporting.tables import (
        result_notes as result_notes,
        result_table as result_table,
        tuning_table as tuning_table,
        tuning_text as tuning_text,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
