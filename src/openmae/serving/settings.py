"""What the server admits."""

from __future__ import annotations

from dataclasses import dataclass

from openmae.errors import UserError

_PILLOWS_LIMIT = 178_956_970  # pixels; Pillow opens nothing beyond


@dataclass(frozen=True)
class Settings:
    """Limits of ``mae serve``.

    Attributes:
        max_batch: images that the model runs at once.
        max_request_mb: of a request's body, in 1,000,000 bytes.
        max_pixels: of an image, by its header.
        max_images: in a request.
        max_requests: that are answered at once; each may hold a body.
        max_waiting: images of all requests, from before they are decoded until they are answered.
        header_seconds: for a request's headers to arrive, counted from the connection or the request before.
        read_seconds: for a request's body to arrive.
        write_seconds: for a client to take more of an answer.

    Raises:
        UserError: an option of the command is out of its bounds.
    """

    max_batch: int = 8
    max_request_mb: float = 32.0
    max_pixels: int = 50_000_000
    max_images: int = 64
    max_requests: int = 64
    max_waiting: int = 256
    header_seconds: float = 10.0
    read_seconds: float = 60.0
    write_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise UserError(f"--max-batch must be 1 or more, got {self.max_batch}.", "Leave it out for 8.")
        if not 0 < self.max_request_mb < float("inf"):
            raise UserError(f"--max-request-mb must be above 0, got {self.max_request_mb:g}.", "Leave it out for 32.")
        if not 1 <= self.max_pixels <= _PILLOWS_LIMIT:
            raise UserError(
                f"--max-pixels must be between 1 and {_PILLOWS_LIMIT:,} (Pillow opens nothing larger), "
                f"got {self.max_pixels:,}.",
                "Leave it out for 50,000,000.",
            )

    @property
    def max_bytes(self) -> int:
        """Of a request's body."""
        return round(self.max_request_mb * 1_000_000)

    @property
    def max_request_pixels(self) -> int:
        """Of all images of a request, by their headers."""
        return 4 * self.max_pixels

    @property
    def max_held_bytes(self) -> int:
        """Of the bodies of all requests, from their first byte until they are answered."""
        return 16 * self.max_bytes
