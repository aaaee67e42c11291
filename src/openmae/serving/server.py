"""From the command line to a running server."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from openmae.engines.predictor import Predictor, open_predictor
from openmae.errors import UserError
from openmae.serving.settings import Settings
from openmae.spec.option import is_secret

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

log = logging.getLogger("openmae")

_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
_LAST_SECONDS = 30  # that requests under way get when the server is told to stop


def serve(
    model: Path, host: str, port: int, settings: Settings, device: str = "auto", encryption_key: str = ""
) -> None:
    """Answer requests until interrupted, or told to terminate; those under way are finished.

    Args:
        model: a checkpoint, an ONNX file or a TensorRT engine.
        host, port: where to listen; port 0 takes a free one.
        settings: limits.
        device: cpu, cuda, or auto: cuda where there is one.
        encryption_key: of an encrypted model: ``env:NAME`` or ``file:PATH``.

    Raises:
        UserError: packages of the extra ``serve`` are missing, the model cannot be used, or the address cannot.
    """
    _check_packages()
    if is_secret(encryption_key):
        raise UserError(
            "--encryption-key takes env:NAME or file:PATH, not the key: others may read it in the list of processes.",
            "Put the key into an environment variable or a file, and name that; this key has been seen already.",
        )
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from openmae.serving.access_log import limited_logs
    from openmae.serving.app import create_app

    with _listen(host, port) as listener:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        predictor = open_predictor(model, device, encryption_key)
        _warm_up(predictor)
        app = create_app(predictor, settings)
        config = _configure(app, settings)
        address, own = _address(listener), ipaddress.ip_address(listener.getsockname()[0])
        if own.is_loopback and own.version == 4:  # else a page of another site could reach it under a name of its own
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", str(own)])
        if not own.is_loopback:
            log.warning(
                "Other machines may reach %s, and there is no authentication and no encryption. "
                "Put a proxy with both in front, or leave --host out.",
                address,
            )
        print(f"{predictor.card.model.arch} ({predictor.runtime}) answers at {address} (Ctrl-C stops it)", flush=True)
        with limited_logs():
            uvicorn.Server(config).run(sockets=[listener])


def _configure(app: FastAPI, settings: Settings) -> uvicorn.Config:
    import uvicorn

    from openmae.serving.connections import descriptor_limits, limited

    most, backlog = descriptor_limits()
    return uvicorn.Config(
        app,
        http=limited(settings, most),
        ws="none",
        backlog=backlog,
        log_level="warning",
        timeout_graceful_shutdown=_LAST_SECONDS,
    )


def _check_packages() -> None:
    if missing := [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise UserError(
            f"`mae serve` needs {', '.join(_PACKAGES.values())}; missing: {', '.join(missing)}.",
            "pip install 'openmae[serve]'",
        )


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the address, taken before a model is loaded in vain."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be between 0 and 65535, got {port}.", "Leave it out for 8000.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
        # Connections inherit it. asyncio sets it only for sockets made with proto=IPPROTO_TCP, and without it an
        # answer's body waits 40 ms for the client to acknowledge the headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        # Python's own text of a failed bind repeats the address.
        if isinstance(error, UnicodeError):
            reason = "that is no address"
        else:
            reason = str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise UserError(
            f"Cannot listen at --host {host} --port {port}: {reason}.",
            "Name an address of this machine (127.0.0.1, or 0.0.0.0 for all) and a free port; --port 0 finds one.",
        ) from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _warm_up(predictor: Predictor) -> None:
    """The first run allocates and compiles; better now than for a client, and a model that cannot run says so."""
    config = predictor.card.model
    predictor(torch.zeros(1, config.in_chans, *config.input_size, dtype=torch.uint8, device=predictor.device))
