"""Fixtures of all tests in this folder."""

from tests.helpers.job_fixtures import images, run_code, surroundings
