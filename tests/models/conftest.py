"""Fixtures of the tests in this folder."""

from tests.helpers.models import assert_near, built, draw_mask, randomise
