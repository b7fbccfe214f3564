"""Fixtures of training, which runs are made by."""

from tests.training.conftest import tiny as tiny
