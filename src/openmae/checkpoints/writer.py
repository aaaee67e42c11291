"""Background writing of checkpoints: a host copy of tensors that training will change, and a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A copy of a checkpoint's tensors in host memory.

    The next checkpoint reuses its buffers: allocating memory takes several times as long as copying.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of ``payload``, valid until the next call."""
        copy = self._copy(payload, ())
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the copies are asynchronous
        return copy

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), path)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, (*path, number)) for number, item in enumerate(value))
        return value

    def _copy_tensor(self, value: Tensor, path: tuple[Any, ...]) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = self._buffers[path] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffer.copy_(value, non_blocking=True)


class BackgroundWorker:
    """One thread that runs one function at a time; its exception is raised by the next :meth:`wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start ``work``; nothing else may be running."""
        assert self._thread is None
        # A daemon thread, so that a second Ctrl-C does not wait for it; every other exit waits, through `wait`.
        self._thread = threading.Thread(target=self._run, args=(work,), name="openmae-checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the work ends, or for ``seconds``; raise its exception, once."""
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
