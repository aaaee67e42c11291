"""Fixtures of the tests in this folder."""

from tests.helpers.training import (
    _one_thread,
    assert_same,
    assert_same_run,
    payload_of,
    photos,
    tiny_overrides,
    train,
)
