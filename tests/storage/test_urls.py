from __future__ import annotations

import pytest

from openmae.errors import DataError
from openmae.storage.urls import checked, is_remote, join, name_of, parent_of, redact


def test_urls_are_distinguished_from_paths():
    for url in ("s3://b/k", "gs://b", "http://h/x", "HTTPS://h/x", "  s3://b/k"):
        assert is_remote(url), url
    for path in ("photos", "/a/b", "C:\\x", "ftp://h/x", "file:///x", "s3:/b", ""):
        assert not is_remote(path), path


def test_parts_of_urls():
    assert join("s3://b/a/", "c/d.txt") == "s3://b/a/c/d.txt"
    assert join("https://h/a?sig=1", "c") == "https://h/a/c?sig=1"
    assert join("s3://b/what?", "c") == "s3://b/what?/c", "a key may hold a question mark"
    assert name_of("https://u:p@h/a/set.tar.gz?sig=a/b") == "set.tar.gz"
    assert name_of("s3://b/a/") == "a"
    assert name_of("https://u:p@h") == "h"
    assert parent_of("s3://b/a/m.onnx") == "s3://b/a"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pw@host/a?X-Amz-Signature=secret", "https://host/a?..."),
        ("s3://KEY:hunter2@bucket/a", "s3://bucket/a"),
        ("https://host/mail@home", "https://host/mail@home"),
        ("s3://b/a", "s3://b/a"),
    ],
)
def test_secrets_are_not_shown(url, shown):
    assert redact(url) == shown


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3:///key", "s3:///key names no bucket"),
        ("https://?x", "names no host"),
        ("ftp://h/x", "ftp:// is not supported"),
        ("s3://KEY:hunter2@bucket/a", "credentials do not belong in a s3:// URL"),
    ],
)
def test_invalid_urls(url, text):
    with pytest.raises(DataError) as caught:
        checked(url)
    assert text in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert checked(" S3://bucket/Key ") == "s3://bucket/Key"
