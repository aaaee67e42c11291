"""Fixtures of the tests in this folder."""

from tests.helpers.checkpoints import files, model, pretrained, state
from tests.helpers.models import assert_near, built, draw_mask, randomise
from tests.helpers.training import (
    _one_thread,
    assert_same,
    assert_same_run,
    payload_of,
    photos,
    tiny_overrides,
    train,
)
