"""The limits of ``mae serve``."""

from __future__ import annotations

from dataclasses import dataclass

from openmae.errors import UserError

_PILLOW_LIMIT = 178_956_970  # pixels; Pillow opens no larger image


@dataclass(frozen=True)
class Settings:
    """The limits of a server, all of them maxima.

    Attributes:
        max_batch: Images per run of the model.
        max_request_mb: Size of a request's body in units of 1,000,000 bytes.
        max_pixels: Pixels of an image, according to its header.
        max_images: Images per request.
        max_requests: Requests in progress.
        max_waiting: Images of all requests in progress, from before they are decoded until they are answered.
        header_seconds: Time until a request's headers arrive, from the connection or the end of the previous request.
        read_seconds: Time until a request's body arrives.
        write_seconds: Time during which a client does not read a response.

    Raises:
        UserError: A limit that can be set on the command line is out of bounds.
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
            raise UserError(f"--max-batch must be 1 or more, got {self.max_batch}.", "Omit it to use the default, 8.")
        if not 0 < self.max_request_mb < float("inf"):
            raise UserError(
                f"--max-request-mb must be above 0, got {self.max_request_mb:g}.", "Omit it to use the default, 32."
            )
        if not 1 <= self.max_pixels <= _PILLOW_LIMIT:
            raise UserError(
                f"--max-pixels must be between 1 and {_PILLOW_LIMIT:,} (Pillow opens no larger image), "
                f"got {self.max_pixels:,}.",
                "Omit it to use the default, 50,000,000.",
            )

    @property
    def max_bytes(self) -> int:
        """Maximum size of a request's body in bytes."""
        return round(self.max_request_mb * 1_000_000)

    @property
    def max_request_pixels(self) -> int:
        """Maximum number of pixels of all images in a request, according to their headers."""
        return 4 * self.max_pixels

    @property
    def max_held_bytes(self) -> int:
        """Maximum size in bytes of the bodies of all requests, from their first byte until they are answered."""
        return 16 * self.max_bytes
