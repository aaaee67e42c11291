"""Talking to object stores and web servers: credentials from the environment, a time limit, errors in plain words."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import os
import ssl
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, get_loop

from openmae.errors import DataError
from openmae.storage.urls import checked, redact, scheme_of

T = TypeVar("T")

ANSWER_LIMIT = 20.0  # seconds for a question about what is there; a command that asks takes some to start
CONNECTIONS = 32

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


def open_filesystem(url: str) -> AsyncFileSystem:
    """The file system of a URL, with the credentials and the endpoint that the environment names.

    s3: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``;
    where one is unset, the older ``ACCESS_KEY``, ``SECRET_KEY``, ``CLOUD_REGION``, ``S3_ENDPOINT_URL``; else what
    botocore finds (profiles, roles). Nothing is sent yet.

    Raises:
        DataError: the URL or the credentials are incomplete, or a package is missing.
    """
    url = checked(url)
    scheme = scheme_of(url)
    if scheme == "s3":
        options = _s3_options(url)
    elif scheme == "gs":
        options = {"use_listings_cache": False}
    else:
        options = {"client_kwargs": _http_options(), "use_listings_cache": False}
    try:
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise DataError(
            f"{redact(url)}: {scheme}:// needs a package that is not installed ({error.name or error}).",
            "Install it: pip install 'openmae[gs]'." if scheme == "gs" else "Install openmae anew.",
        ) from error
    if scheme == "s3":
        filesystem.retries = 2  # transfers have retries of their own, and a question a limit
    assert isinstance(filesystem, AsyncFileSystem)
    return filesystem


def ask(
    url: str, question: Coroutine[Any, Any, T], *, limit: float | None = None, watch: Callable[[], None] | None = None
) -> T:
    """Run a coroutine of the file system's and return its result; Ctrl-C ends it.

    Args:
        url: what it is about, for messages.
        question: runs in fsspec's own thread.
        limit: seconds; default ``ANSWER_LIMIT``. ``math.inf``: none.
        watch: called several times a second while it runs.

    Raises:
        DataError: it failed; the text names the URL and what to check.
    """
    limit = ANSWER_LIMIT if limit is None else limit
    bounded = asyncio.wait_for(question, None if limit == float("inf") else limit)
    future = asyncio.run_coroutine_threadsafe(bounded, get_loop())
    try:
        while not concurrent.futures.wait([future], timeout=0.2).done:
            if watch is not None:
                watch()
        return future.result()
    except DataError:
        raise
    except Exception as error:
        raise explain(error, url) from error
    finally:
        future.cancel()


def explain(error: BaseException, url: str) -> DataError:
    """What went wrong with ``url``, and what to check; the text repeats nothing that a server or library said."""
    if isinstance(error, BaseExceptionGroup):
        return explain(error.exceptions[0], url)
    if isinstance(error, DataError):
        return error
    code, shown = error_code(error), redact(url)
    kinds = {type(cause).__name__ for cause in _causes(error)}
    bucket = url.partition("://")[2].partition("/")[0]
    if code == "NoSuchBucket":
        return DataError(f"{shown}: there is no bucket {bucket!r}.", f"Check the bucket's name and {endpoint(url)}.")
    if code in ("InvalidBucketName", "InvalidBucketState") or "ParamValidationError" in kinds:
        return DataError(f"{shown}: {bucket!r} is no name of a bucket.", "Write s3://BUCKET/path.")
    if code in _MISSING or (not code and isinstance(error, FileNotFoundError)):
        return DataError(f"There is nothing at {shown}.", f"Check the path, upper and lower case, and {endpoint(url)}.")
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}:
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
        return DataError(f"{shown}: this machine's clock is wrong, so requests are refused.", "Set the clock.")
    if code in _BUSY:
        return DataError(f"{shown}: the server failed ({code}).", f"Try again later, or check {endpoint(url)}.")
    return _explain_connection(error, kinds, code, url)


def _explain_connection(error: BaseException, kinds: set[str], code: str, url: str) -> DataError:
    shown = redact(url)
    causes = list(_causes(error))
    if any("SSL" in kind or "Certificate" in kind for kind in kinds) or any(
        isinstance(cause, ssl.SSLError) for cause in causes
    ):
        return DataError(f"{shown}: the server's certificate is not trusted.", f"Check {endpoint(url)}.")
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in causes):
        return DataError(
            f"{shown}: the server did not answer in time.", f"Check {endpoint(url)}, the network and any proxy."
        )
    if is_transient(error):
        return DataError(
            f"{shown}: the server cannot be reached, or cuts the connection.",
            f"Check {endpoint(url)}, and the network.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return DataError(
            f"{shown} could not be stored: {os.strerror(error.errno or 0).lower()}.",
            "Make room in the cache's disk, or set OPENMAE_CACHE to another folder.",
        )
    if "InvalidUrlClientError" in kinds or isinstance(error, ValueError):
        return DataError(f"{shown} is no valid address, or {endpoint(url)} is none.", "Correct it.")
    return DataError(
        f"{shown} could not be used ({code or type(error).__name__}).", f"Check the path, {endpoint(url)} and rights."
    )


def error_code(error: BaseException) -> str:
    """The store's code (``NoSuchKey``) or the HTTP status in an error; empty where it has none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and response.get("Error"):
            return str(response["Error"].get("Code", ""))
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return str(status)
    return ""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    if code := error_code(error):
        return code in _BUSY
    names = {base.__name__ for cause in _causes(error) for base in type(cause).__mro__}
    return bool(
        names
        & {
            *("ConnectionError", "TimeoutError", "gaierror", "HTTPClientError", "IncompleteReadError"),
            *("ResponseStreamingError", "ClientConnectionError", "ClientPayloadError", "FSTimeoutError"),
        }
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first(names: tuple[str, ...]) -> tuple[str, str]:
    """The first variable that is set, and its value."""
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", ""))


def _s3_options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "config_kwargs": {
            "connect_timeout": 8,
            "read_timeout": 20,
            "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 2, "mode": "standard"},
        },
        "use_listings_cache": False,
    }
    if not os.environ.get("AWS_PROFILE"):
        options |= _s3_keys(url)
    if endpoint := _first(_ENDPOINTS)[1]:
        options["endpoint_url"] = endpoint
    if region := _first(_REGIONS)[1]:
        options["client_kwargs"] = {"region_name": region}
    return options


def _s3_keys(url: str) -> dict[str, str]:
    for names in _CREDENTIALS:
        found = [os.environ.get(name, "") for name in names]
        if all(found):
            token = os.environ.get("AWS_SESSION_TOKEN") if names == _CREDENTIALS[0] else None
            return {"key": found[0], "secret": found[1], **({"token": token} if token else {})}
        if any(found):
            present, absent = (names[0], names[1]) if found[0] else (names[1], names[0])
            raise DataError(f"{redact(url)}: {present} is set, but {absent} is not.", f"Set {absent} as well.")
    return {}


def _http_options() -> dict[str, Any]:
    import aiohttp

    return {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=8, sock_read=20),
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,  # a file is what lies there, byte by byte
        "trust_env": True,
    }


def _credentials(url: str) -> str:
    if scheme_of(url) == "gs":
        return "GOOGLE_APPLICATION_CREDENTIALS"
    if scheme_of(url) != "s3":
        return "the user, password or signature in the URL"
    if profile := os.environ.get("AWS_PROFILE"):
        return f"AWS_PROFILE ({profile})"
    names = next((names for names in _CREDENTIALS if all(map(os.environ.get, names))), _CREDENTIALS[0])
    return " and ".join(names)


def endpoint(url: str) -> str:
    """What says where a URL's server is, for messages."""
    if scheme_of(url) == "gs":
        return "the bucket's project"
    if scheme_of(url) != "s3":
        return "the host's name"
    name, value = _first(_ENDPOINTS)
    return f"{name} ({redact(value)})" if name else "AWS_ENDPOINT_URL, which is unset: the store is Amazon's"
