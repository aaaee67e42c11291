"""URLs of object stores and web servers: recognise, join, and redact them."""

from __future__ import annotations

from openmae.errors import DataError

SCHEMES = ("s3", "gs", "http", "https")
WRITABLE = ("s3", "gs")


def is_remote(text: str) -> bool:
    """Return whether ``text`` is an s3://, gs://, http:// or https:// URL."""
    return scheme_of(text) in SCHEMES


def is_web(url: str) -> bool:
    """Return whether ``url`` is an http:// or https:// URL."""
    return scheme_of(url) in ("http", "https")


def scheme_of(text: str) -> str:
    """Return the scheme in lower case; empty for a path."""
    scheme, found, _ = text.strip().partition("://")
    return scheme.lower() if found else ""


def join(url: str, name: str) -> str:
    """Return the URL of a name below ``url``; a query stays at the end."""
    base, query = split_query(url)
    return f"{base.rstrip('/')}/{name.strip('/')}{query}"


def append_suffix(url: str, suffix: str) -> str:
    """Return the URL of the file with ``suffix`` appended to its name."""
    base, query = split_query(url)
    return base + suffix + query


def name_of(url: str) -> str:
    """Return the last name in a URL's path, or the host or bucket if there is no path."""
    path = split_query(url)[0].partition("://")[2].rstrip("/")
    return path.rpartition("/")[2].rpartition("@")[2]


def parent_of(url: str) -> str:
    """Return the URL of the folder that holds ``url``."""
    return split_query(url)[0].rstrip("/").rpartition("/")[0]


def redact(url: str) -> str:
    """Return ``url`` without user and password, and with its query, which may hold a signature, as ``?...``."""
    base, mark, _ = url.strip().partition("?")
    scheme, found, rest = base.partition("://")
    host, slash, path = rest.partition("/")
    shown = f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"
    return f"{shown}?..." if mark else shown


def checked(url: str) -> str:
    """Return ``url`` without surrounding spaces and with its scheme in lower case.

    Raises:
        DataError: the scheme is not supported, there is no bucket or host, or a store's URL holds credentials.
    """
    url = url.strip()
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        raise DataError(
            f"{redact(url)}: {scheme}:// is not supported.", "Use s3://, gs://, http://, https:// or a path."
        )
    rest = url.partition("://")[2]
    host = rest.partition("/")[0].partition("?")[0]
    if "@" in host and scheme in WRITABLE:
        variables = {
            "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            "gs": "GOOGLE_APPLICATION_CREDENTIALS",
        }[scheme]
        raise DataError(
            f"{redact(url)}: credentials do not belong in a {scheme}:// URL.",
            f"Remove them from it, and set {variables}.",
        )
    if not host.rpartition("@")[2]:
        what = "bucket" if scheme in WRITABLE else "host"
        raise DataError(f"{redact(url)} names no {what}.", f"Write {scheme}://{what.upper()}/path.")
    return f"{scheme}://{rest}"


def split_query(url: str) -> tuple[str, str]:
    """Return a web server's URL and its query with the ``?``; elsewhere, a ``?`` is part of the name."""
    base, mark, query = url.partition("?") if is_web(url) else (url, "", "")
    return base, mark + query
