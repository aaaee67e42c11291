"""The command ``mae serve``: check the address and the model, then run the server."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from pathlib import Path

import python_multipart  # noqa: F401  (starlette reads forms with it, and imports it late)
import torch
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from openmae.engines.predictor import Predictor, open_predictor
from openmae.errors import UserError
from openmae.serving.access_log import limited_logs
from openmae.serving.app import create_app
from openmae.serving.connections import descriptor_limits, limited
from openmae.serving.settings import Settings
from openmae.spec.option import is_secret

log = logging.getLogger("openmae")

_GRACE = 30  # seconds for requests in progress when the server stops


def serve(
    model: Path, host: str, port: int, settings: Settings, device: str = "auto", encryption_key: str = ""
) -> None:
    """Serve requests until SIGINT or SIGTERM; then requests in progress are finished.

    Args:
        model: A checkpoint, an ONNX file or a TensorRT engine.
        host: Address to listen on.
        port: Port to listen on; 0 chooses a free one.
        settings: The limits of the server.
        device: cpu, cuda, or auto (cuda if there is a GPU).
        encryption_key: Key of an encrypted model: ``env:NAME`` or ``file:PATH``.

    Raises:
        UserError: The model or the address cannot be used.
    """
    if is_secret(encryption_key):
        raise UserError(
            "--encryption-key takes env:NAME or file:PATH, not the key: others can read it in the process list.",
            "Put a new key into an environment variable or a file; this one may have been read.",
        )
    with _listen(host, port) as listener:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        predictor = open_predictor(model, device, encryption_key)
        _warm_up(predictor)
        app = create_app(predictor, settings)
        config = _configure(app, settings)
        address, own = _address(listener), ipaddress.ip_address(listener.getsockname()[0])
        if (
            own.is_loopback and own.version == 4
        ):  # prevents DNS rebinding: a web page reaching the server by a domain name that resolves to this address
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", str(own)])
        if not own.is_loopback:
            log.warning(
                "Other machines may reach %s, which has no authentication and no encryption. "
                "Put a proxy with both in front of it, or leave --host out.",
                address,
            )
        print(
            f"{predictor.card.model.arch} ({predictor.runtime}) is serving at {address} (press Ctrl-C to stop)",
            flush=True,
        )
        with limited_logs():
            uvicorn.Server(config).run(sockets=[listener])


def _configure(app: FastAPI, settings: Settings) -> uvicorn.Config:
    most, backlog = descriptor_limits()
    return uvicorn.Config(
        app,
        http=limited(settings, most),
        ws="none",
        backlog=backlog,
        headers=[("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")],
        log_level="warning",
        timeout_graceful_shutdown=_GRACE,
    )


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. It is opened before the model is loaded, so that errors are reported early."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be between 0 and 65535, got {port}.", "Omit it to use the default, 8000.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
        # Connections inherit TCP_NODELAY. asyncio sets it only for sockets created with proto=IPPROTO_TCP; without it,
        # the body of a response waits 40 ms until the client has acknowledged the headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        reason = "it is not an address"
        if isinstance(error, OSError):  # not str(error): for a failed bind, it repeats the address
            reason = str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise UserError(
            f"Cannot listen on --host {host} --port {port}: {reason}.",
            "Use an address of this machine (127.0.0.1, or 0.0.0.0 for all) and a free port; --port 0 finds one.",
        ) from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _warm_up(predictor: Predictor) -> None:
    """Run the model once, to allocate memory, compile code and find errors before the first request."""
    config = predictor.card.model
    predictor(torch.zeros(1, config.in_chans, *config.input_size, dtype=torch.uint8, device=predictor.device))
