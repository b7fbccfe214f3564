"""A lock ends with its owner, and with nothing else."""

import os
import time

import pytest

from localvit.runs.lock import FolderInUse, locked


def in_child(action):
    """Return the exit code of a forked process that does `action`: 3 if it is refused the folder."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except FolderInUse:
            code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lock(folder):
    with locked(folder):
        pass


@pytest.mark.parametrize("removed", [False, True])
def test_another_process_is_refused_even_if_the_file_is_removed(tmp_path, removed):
    with locked(tmp_path):
        if removed:
            (tmp_path / ".lock").unlink()
        assert in_child(lambda: lock(tmp_path)) == 3
    assert in_child(lambda: lock(tmp_path)) == 0


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    reader, writer = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(writer, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 1)
    try:
        lock(tmp_path)
        assert in_child(lambda: lock(tmp_path)) == 0
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_a_forked_process_that_leaves_the_block_drops_nothing_of_its_parent(tmp_path):
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.open(os.devnull, os.O_RDONLY)  # takes a number that was closed
            code = 1
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert in_child(lambda: lock(tmp_path)) == 3
    if child == 0:
        os._exit(0)
    assert code == 0
