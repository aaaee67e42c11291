"""Access to object stores and web servers: credentials from the environment, time limits and error messages."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import math
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from openmae.errors import DataError, causes_of
from openmae.storage.atomic import UNWRITTEN
from openmae.storage.urls import checked, is_web, redact, scheme_of

if TYPE_CHECKING:
    from fsspec.asyn import AsyncFileSystem

T = TypeVar("T")

ANSWER_LIMIT = 20.0  # seconds for a request; a command, which also takes time to start, should fail within 30
CONNECTIONS = 32

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # each is installed with the extra of that name
_CREDENTIALS = (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("ACCESS_KEY", "SECRET_KEY"))
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION", "CLOUD_REGION")

_MISSING = {"NoSuchKey", "NoSuchVersion", "404"}
_REFUSED_KEYS = {
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "401"),
    *("InvalidSecurity", "CredentialsNotSupported", "AuthorizationHeaderMalformed"),
}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidObjectState", "Forbidden", "403"}
_ELSEWHERE = {"PermanentRedirect", "Redirect", "TemporaryRedirect", "IllegalLocationConstraintException", "301", "307"}
_BUSY = {"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "429", "500", "502", "503", "504"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_CONNECTION_ERRORS = {
    *("ConnectionError", "TimeoutError", "gaierror", "HTTPClientError", "IncompleteReadError"),
    *("ResponseStreamingError", "ClientConnectionError", "ClientPayloadError", "FSTimeoutError"),
}


def open_filesystem(url: str) -> AsyncFileSystem:
    """Return the file system of a URL, with credentials and endpoint from the environment; nothing is sent.

    For s3, these are ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION`` and
    ``AWS_ENDPOINT_URL``, or the older ``ACCESS_KEY``, ``SECRET_KEY``, ``CLOUD_REGION`` and ``S3_ENDPOINT_URL``. Without
    keys, or if ``AWS_PROFILE`` is set, botocore finds the credentials (profiles, roles).

    Raises:
        DataError: the URL or the credentials are incomplete, or a package is missing.
    """
    import fsspec

    url = checked(url)
    scheme = scheme_of(url)
    if package := _PACKAGES.get(scheme):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise DataError(
                f"{redact(url)}: {scheme}:// needs {package}; missing: {error.name}.",
                f"pip install 'openmae[{scheme}]'",
            ) from error
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        options |= _s3_options(url)
    elif is_web(url):
        options["client_kwargs"] = _http_options()
    filesystem: AsyncFileSystem = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        filesystem.retries = 2  # transfers have their own retries, and other requests a time limit
    return filesystem


def ask(
    url: str, question: Coroutine[Any, Any, T], *, limit: float | None = None, watch: Callable[[], None] | None = None
) -> T:
    """Run a coroutine of a file system and return its result; Ctrl-C cancels it.

    Args:
        url: URL that the request is about, for messages.
        question: coroutine, run in fsspec's thread.
        limit: seconds; None for ``ANSWER_LIMIT``, ``math.inf`` for no limit.
        watch: called several times a second while the coroutine runs.

    Raises:
        DataError: the request failed; the message names the URL and what to check.
    """
    from fsspec.asyn import get_loop

    limit = ANSWER_LIMIT if limit is None else limit
    bounded = asyncio.wait_for(question, None if limit == math.inf else limit)
    future = asyncio.run_coroutine_threadsafe(bounded, get_loop())
    try:
        while not concurrent.futures.wait([future], timeout=0.2).done:
            if watch is not None:
                watch()
        return future.result()
    except Exception as failure:
        error = failure
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, DataError):
            raise error from error.__cause__
        raise explain(error, url) from error
    finally:
        future.cancel()


def missing(url: str) -> DataError:
    """Return the error for a URL at which there is nothing."""
    return DataError(
        f"There is nothing at {redact(url)}.", f"Check the path, upper and lower case, and {endpoint(url)}."
    )


def is_missing(error: DataError) -> bool:
    """Return whether an error of ``ask`` means that the file, but not its bucket, is missing."""
    code = error_code(error)
    return code != "NoSuchBucket" and (code in _MISSING or isinstance(error.__cause__, FileNotFoundError))


def explain(error: BaseException, url: str) -> DataError:
    """Return an error that says what went wrong with ``url`` and what to check, without quoting the server."""
    if isinstance(error, DataError):
        return error
    code, shown = error_code(error), redact(url)
    kinds = _kinds(error)
    bucket = url.partition("://")[2].partition("/")[0]
    if code == "NoSuchBucket":
        return DataError(f"{shown}: there is no bucket {bucket!r}.", f"Check the bucket's name and {endpoint(url)}.")
    if code in ("InvalidBucketName", "InvalidBucketState") or "ParamValidationError" in kinds:
        return DataError(f"{shown}: {bucket!r} is not a valid bucket name.", "Write s3://BUCKET/path.")
    if code in _MISSING or (not code and isinstance(error, FileNotFoundError)):
        return missing(url)
    if kinds & _NO_CREDENTIALS:
        return DataError(
            f"{shown}: no credentials were found.",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        )
    if code in _REFUSED_KEYS:
        return DataError(f"{shown}: the credentials were refused ({code}).", f"Check {_credentials(url)}.")
    if code in _DENIED or (not code and isinstance(error, PermissionError)):
        return DataError(
            f"{shown}: access was denied ({code or 'not allowed'}).",
            f"Check the path, and that {_credentials(url)} may use it.",
        )
    if code in _ELSEWHERE:
        return DataError(f"{shown}: the bucket is in another region.", "Set AWS_REGION to the bucket's region.")
    if code == "RequestTimeTooSkewed":
        return DataError(f"{shown}: the clock of this machine is wrong, so requests are refused.", "Set the clock.")
    if code in _BUSY:
        return DataError(f"{shown}: the server failed ({code}).", f"Try again later, or check {endpoint(url)}.")
    return _explain_connection(error, kinds, code, url)


def _explain_connection(error: BaseException, kinds: set[str], code: str, url: str) -> DataError:
    shown, check = redact(url), f"Check {endpoint(url)}"
    if any("SSL" in kind or "Certificate" in kind for kind in kinds):
        return DataError(f"{shown}: the server's certificate is not trusted.", f"{check}.")
    if any("Timeout" in kind for kind in kinds):
        return DataError(f"{shown}: the server did not answer in time.", f"{check}, the network and any proxy.")
    if is_transient(error):
        return DataError(
            f"{shown}: the server cannot be reached, or closes the connection.", f"{check}, and the network."
        )
    if isinstance(error, OSError) and error.errno in UNWRITTEN:
        return DataError(
            f"{shown} could not be stored: {os.strerror(error.errno or 0).lower()}.",
            "Free some space on the cache's disk, or set OPENMAE_CACHE to another folder.",
        )
    if "InvalidUrlClientError" in kinds or isinstance(error, ValueError):
        return DataError(f"{shown} or {endpoint(url)} is not a valid address.", "Correct it.")
    return DataError(
        f"{shown} could not be used ({code or type(error).__name__}).",
        f"Check the path, {endpoint(url)} and your permissions.",
    )


def error_code(error: BaseException) -> str:
    """Return the store's code (``NoSuchKey``) or the HTTP status in an error; empty if it has none."""
    for cause in causes_of(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and response.get("Error"):
            return str(response["Error"].get("Code", ""))
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return str(status)
    return ""


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later."""
    if code := error_code(error):
        return code in _BUSY
    return not _kinds(error).isdisjoint(_CONNECTION_ERRORS)


def _kinds(error: BaseException) -> set[str]:
    """Return the names of the classes of an error and its causes; the classes of optional packages are not imported."""
    return {kind.__name__ for cause in causes_of(error) for kind in type(cause).__mro__}


def _first_set(names: tuple[str, ...]) -> tuple[str, str]:
    """Return the name and the value of the first environment variable that is set, or two empty strings."""
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", ""))


def _s3_options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "config_kwargs": {
            "connect_timeout": 8,
            "read_timeout": 20,
            "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 2, "mode": "standard"},
        },
    }
    if not os.environ.get("AWS_PROFILE"):
        options |= _s3_keys(url)
    if endpoint_url := _first_set(_ENDPOINTS)[1]:
        options["endpoint_url"] = endpoint_url
    if region := _first_set(_REGIONS)[1]:
        options["client_kwargs"] = {"region_name": region}
    return options


def _s3_keys(url: str) -> dict[str, str]:
    for names in _CREDENTIALS:
        found = [os.environ.get(name, "") for name in names]
        if all(found):
            token = os.environ.get("AWS_SESSION_TOKEN") if names == _CREDENTIALS[0] else None
            return {"key": found[0], "secret": found[1], **({"token": token} if token else {})}
        if any(found):
            present, absent = names if found[0] else names[::-1]
            raise DataError(f"{redact(url)}: {present} is set, but {absent} is not.", f"Set {absent} as well.")
    return {}


def _http_options() -> dict[str, Any]:
    import aiohttp

    return {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=8, sock_read=20),
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,  # a compressed file stays as it is
        "trust_env": True,
    }


def _credentials(url: str) -> str:
    if scheme_of(url) == "gs":
        return "GOOGLE_APPLICATION_CREDENTIALS"
    if is_web(url):
        return "the user, password or signature in the URL"
    if profile := os.environ.get("AWS_PROFILE"):
        return f"AWS_PROFILE ({profile})"
    return " and ".join(next((names for names in _CREDENTIALS if all(map(os.environ.get, names))), _CREDENTIALS[0]))


def endpoint(url: str) -> str:
    """Return the setting or part of the URL that determines the server, for messages."""
    if scheme_of(url) == "gs":
        return "the bucket's project"
    if is_web(url):
        return "the host's name"
    name, value = _first_set(_ENDPOINTS)
    return f"{name} ({redact(value)})" if name else "AWS_ENDPOINT_URL, which is unset: the store is Amazon's"
