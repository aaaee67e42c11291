"""Work beside the training: a copy of the tensors that the next update changes, and a thread that writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies what a checkpoint is made of into host memory, which is used again for the same part of the next one.

    New memory would cost several times what copying into it does. What the next one lacks is let go: only some have a
    best with them.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def take(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """A copy, which holds until the next one is taken."""
        places = set(_tensor_places(payload, ()))
        self._kept = {place: tensor for place, tensor in self._kept.items() if place in places}
        copy = self._copied(payload, ())
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the copies were only asked for
        return copy

    def _copied(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), place)
        if isinstance(value, Mapping):
            return {key: self._copied(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(item, (*place, number)) for number, item in enumerate(value))
        return value

    def _tensor(self, value: Tensor, place: tuple[Any, ...]) -> Tensor:
        kept = self._kept.get(place)
        if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
            kept = self._kept[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return kept.copy_(value, non_blocking=True)


def _tensor_places(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, Tensor):
        yield place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensor_places(item, (*place, key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensor_places(item, (*place, number))


class BackgroundWorker:
    """Does one thing at a time in a thread; what went wrong is raised by whoever waits for it next."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; nothing else may be under way."""
        assert self._thread is None
        # A daemon: a second Ctrl-C does not wait for it. Every other way out does, by `wait`.
        self._thread = threading.Thread(target=self._run, args=(work,), name="openmae-checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Return when nothing is under way, or after some seconds; raises what went wrong, once."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
