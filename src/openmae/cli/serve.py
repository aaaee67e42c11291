"""``mae serve``: options of the HTTP server."""

from __future__ import annotations

import argparse
from pathlib import Path

from openmae.cli.parser import Parser
from openmae.errors import UserError
from openmae.serving.settings import Settings


def add_arguments(parser: Parser) -> None:
    """Add the model, the address and the limits."""
    limits = Settings()
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, metavar="MODEL", help="a checkpoint, an .onnx or an .engine file")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all interfaces (default: %(default)s)")
    add("--port", type=int, default=8000, metavar="N", help="0 picks a free port (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is a GPU")
    add("--encryption-key", default="", metavar="KEY", help="key of an encrypted model: env:NAME or file:PATH")
    add("--max-batch", type=int, default=limits.max_batch, metavar="N", help="images per batch (default: %(default)s)")
    add(
        "--max-request-mb",
        type=float,
        default=limits.max_request_mb,
        metavar="MB",
        help="size of a request with all its images (default: %(default)g)",
    )
    add(
        "--max-pixels",
        type=int,
        default=limits.max_pixels,
        metavar="N",
        help="width x height of an image (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    settings = Settings(max_batch=args.max_batch, max_request_mb=args.max_request_mb, max_pixels=args.max_pixels)
    try:
        from openmae.serving.server import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"`mae serve` needs fastapi, uvicorn and python-multipart; missing: {error.name}.",
            "pip install 'openmae[serve]'",
        ) from error
    serve(args.model, args.host, args.port, settings, args.device, args.encryption_key)
