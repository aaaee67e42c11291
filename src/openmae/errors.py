"""The errors that a user may see: what is wrong, the value, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class OpenMAEError(Exception):
    """Base of every error that OpenMAE raises on purpose.

    Args:
        problem: the rule that was broken and the value that broke it.
        fix: what to do about it; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(problem, fix)

    def __str__(self) -> str:
        return f"{self.problem}\n  Fix: {self.fix}" if self.fix else self.problem


class RunError(OpenMAEError):
    """The request was right, but the run failed (exit code 1): a full disk, a diverged loss."""


class UserError(OpenMAEError, ValueError):
    """The request was wrong (exit code 2). Never raised for a fault of ours."""

    exit_code = 2


class SpecError(UserError):
    """The spec, or an override of it, breaks a rule."""


class DataError(UserError):
    """A data source, or the images in it, cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is damaged, foreign, or does not fit the request."""


class StoppedAtOnce(KeyboardInterrupt):
    """Ctrl-C a second time: nothing more is waited for."""


class Preempted(KeyboardInterrupt):
    """The machine is taken away (SIGTERM, SIGUSR1): the run has to be started again, and goes on from where it was."""

    exit_code = 75  # sysexits.h: EX_TEMPFAIL, "the user is invited to retry"


@contextmanager
def blaming(key: str) -> Iterator[None]:
    """Put a dotted key in front of the text of a wrong request."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{key}: {error.problem}", error.fix) from error
