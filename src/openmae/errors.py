"""Errors that OpenMAE raises on purpose. Each message states the problem, the offending value and a fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class OpenMAEError(Exception):
    """Base class of all errors that OpenMAE raises on purpose.

    Attributes:
        problem: the broken rule and the offending value.
        fix: what to do about it, printed on a separate line; may be empty.
        exit_code: exit code of ``mae`` after this error.

    Example:
        >>> error = SpecError("train.num_epochs must be >= 1, got 0.", "Set it to 1 or more.")
        >>> print(error)
        train.num_epochs must be >= 1, got 0.
          Fix: Set it to 1 or more.
        >>> error.exit_code
        2
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(problem, fix)

    def __str__(self) -> str:
        return f"{self.problem}\n  Fix: {self.fix}" if self.fix else self.problem


class RunError(OpenMAEError):
    """A run with valid input that failed, for example because the disk is full or the loss diverges (exit code 1)."""


class UserError(OpenMAEError, ValueError):
    """Invalid input: a spec, a path or data that cannot be used (exit code 2). Never raised for a bug in OpenMAE."""

    exit_code = 2


class SpecError(UserError):
    """A spec or an override that breaks a rule."""


class DataError(UserError):
    """A data source that cannot be used, or that contains images that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, not recognized, or incompatible with the spec."""


class StoppedAtOnce(KeyboardInterrupt):
    """A second Ctrl-C: stop without waiting for anything."""


class Preempted(KeyboardInterrupt):
    """SIGTERM or SIGUSR1: the platform takes the machine back. The same command resumes the run (exit code 75)."""

    exit_code = 75  # sysexits.h: EX_TEMPFAIL, "the user is invited to retry"


@contextmanager
def blaming(key: str) -> Iterator[None]:
    """Prefix the message of a ``UserError`` raised inside the block with a dotted config key."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{key}: {error.problem}", error.fix) from error


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, the error that it was raised from or while handling, and so on."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__
