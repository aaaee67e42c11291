"""Limits that uvicorn lacks: the number of connections, and the time for headers and for reading a response."""

from __future__ import annotations

import asyncio
import logging
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

from openmae.serving.settings import Settings

_BACKLOG = 128  # connections that wait in the kernel, and may all be accepted at once
_RESERVED = 64  # file descriptors reserved for everything else
_MOST = 1000  # maximum number of connections, even if the system allows more
_TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    b'{"error":"The headers did not arrive in time. Send the request again."}'
)

log = logging.getLogger("openmae")


def descriptor_limits() -> tuple[int, int]:
    """Return the maximum number of open and of waiting connections, within the limit on file descriptors."""
    try:
        import resource
    except ImportError:  # Windows
        return _MOST, _BACKLOG
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST, _BACKLOG
    backlog = max(1, min(_BACKLOG, soft // 8))
    return max(8, min(_MOST, soft - _RESERVED - 2 * backlog)), backlog


class LimitedProtocol(H11Protocol):
    """A connection that is closed if its headers take too long, if its client does not read, or to make room.

    ``limited`` creates a subclass with the limits of a server.
    """

    settings: Settings
    most: int  # maximum number of connections

    _timer: asyncio.TimerHandle | None = None
    _aborted = False
    _since = 0.0  # time at which it began to wait for headers or a body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Close another connection if there are too many, and start the timer for headers."""
        super().connection_made(transport)
        self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop the timer if the headers are complete."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Start the timer for the next headers, or for the rest of a refused body."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._set_timer(None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the timer for the client to read."""
        super().pause_writing()
        self._set_timer(self.settings.write_seconds)

    def resume_writing(self) -> None:
        """Stop the timer for the client to read."""
        super().resume_writing()
        self._set_timer(None)
        self._watch()

    @property
    def waits_for_headers(self) -> bool:
        """True while no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if self.flow.write_paused:
            return
        if not self.waits_for_headers:
            if self._timer is not None:
                self._since = time.monotonic()
                self._set_timer(None)
        elif self._timer is None:
            self._since = time.monotonic()
            self._set_timer(self.settings.header_seconds)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self.flow.write_paused or self.transport.is_closing():
            self.transport.abort()
            return
        if self.cycle is None:
            self.transport.write(_TOO_SLOW)
        self.transport.close()

    def _make_room(self) -> None:
        open_ones = [one for one in self.connections if isinstance(one, LimitedProtocol) and not one._aborted]
        if len(open_ones) <= self.most:
            return
        log.warning("The limit of %d connections is reached: the one that has waited longest is closed.", self.most)
        waiting = [one for one in open_ones if one is not self and not one._is_at_work]
        victim = min(waiting, key=lambda one: one._since, default=self)
        victim._aborted = True  # it stays in the list until the next iteration of the event loop
        victim.transport.abort()

    @property
    def _is_at_work(self) -> bool:
        return not (self.waits_for_headers or self.transport.is_closing() or self.cycle.more_body)


def limited(settings: Settings, most: int) -> type[LimitedProtocol]:
    """Return a protocol class with these limits."""
    return type("Limited", (LimitedProtocol,), {"settings": settings, "most": most})
