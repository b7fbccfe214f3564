import pytest

from localvit.config.files import resolve
from localvit.studies.demo import demo_study
from localvit.studies.execution import run as run_module
from localvit.studies.execution.folder import StudyFolder
from tests.studies.tiny import SETTINGS, make_images, worker_here


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of a study need no worker processes."""
    monkeypatch.setattr(run_module, "_worker", worker_here)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def settings(images):
    return (*SETTINGS, f"data.train={images}")


@pytest.fixture
def tiny(settings):
    return resolve("digits", settings)


@pytest.fixture
def study(tiny):
    return demo_study(tiny, 2, None)


@pytest.fixture
def folder(study, tmp_path):
    return StudyFolder(tmp_path / "out", study)
