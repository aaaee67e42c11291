"""Fixtures of all tests in this folder."""

from tests.helpers.job_fixtures import client, images, run_code, submit, surroundings
