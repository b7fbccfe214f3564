"""Questions, arms and their checks."""

from typing import TYPE_CHECKING

from localvit.imports import door

if TYPE_CHECKING:
    from localvit.studies.design.checks import (
        StudySummary as StudySummary,
        check_study as check_study,
        locality_sites as locality_sites,
        matched as matched,
    )
    from localvit.studies.design.question import (
        list_questions as list_questions,
        load_question as load_question,
        write_question as write_question,
    )
    from localvit.studies.design.resources import Resources as Resources
    from localvit.studies.design.study import (
        Arm as Arm,
        Claim as Claim,
        Metric as Metric,
        Study as Study,
        StudyRun as StudyRun,
        key_of as key_of,
        study_from_dict as study_from_dict,
    )
else:
    __getattr__, __dir__, __all__ = door(__name__)
