"""Messages when a store does not return what was asked for."""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator

import boto3
import pytest

from openmae.data.open import open_index
from openmae.errors import DataError
from openmae.storage import filesystem
from openmae.storage.download import fetch
from openmae.storage.filesystem import open_filesystem
from openmae.storage.listing import list_files, require

pytestmark = pytest.mark.integration


def refused(url: str) -> str:
    """Request a URL that fails, and return the error's text, which must come in time and show no secret."""
    texts = []
    for question in (fetch, require):
        began = time.monotonic()
        with pytest.raises(DataError) as caught:
            question(url)
        assert time.monotonic() - began < 30
        texts.append(str(caught.value))
    text = texts[0]
    assert texts[1] == text, "a look and a download report different problems"
    for secret in ("test-secret", "topsecret", "hunter2"):
        assert secret not in text
    assert "Fix: " in text
    return text


def test_missing_files_and_buckets(store, bucket):
    store.put(bucket, {"a/b.tar": b"x"})
    text = refused(f"s3://{bucket}/a/B.tar")
    assert f"There is nothing at s3://{bucket}/a/B.tar." in text
    assert f"Check the path, upper and lower case, and AWS_ENDPOINT_URL ({store.endpoint})" in text
    assert "There is nothing at" in refused(f"s3://{bucket}/a/b.tar/")
    assert "There is nothing at" in refused(f"s3://{bucket}/a/b")
    text = refused("s3://no-such-bucket-at-all/x")
    assert "there is no bucket 'no-such-bucket-at-all'" in text
    assert "'Not_A_Bucket!' is not a valid bucket name" in refused("s3://Not_A_Bucket!/x")


def test_require_lists_no_folder_completely(store, bucket, web, monkeypatch):
    store.put(bucket, {"a/b/1.png": b"x"})
    web.files |= {"/set/a/1.png": b"1", "/m.bin": b"x"}
    monkeypatch.setattr("openmae.storage.listing.list_files", lambda url: pytest.fail("everything is listed"))
    for url in (f"s3://{bucket}/a/b/1.png", f"s3://{bucket}/a", f"s3://{bucket}/a/", f"s3://{bucket}"):
        require(url)
    for url in (f"{web.url}/m.bin", f"{web.url}/m.bin?X-Signature=1", f"{web.url}/set/"):
        require(url)


def test_a_source_without_images_is_named_by_its_url(store, bucket):
    store.put(bucket, {"a/notes.txt": b"x"})
    with pytest.raises(DataError, match=rf"The folder s3://{bucket}/a holds no images"):
        open_index(f"s3://{bucket}/a", None)


@pytest.fixture
def guarded(store, bucket) -> Iterator[dict[str, str]]:
    """Make the store check credentials; return those of a user who may read only ``open/``."""

    def reset(count: str) -> None:
        url = f"{store.endpoint}/moto-api/reset-auth"
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, count.encode(), headers)).close()

    iam = boto3.client("iam", endpoint_url=store.endpoint, region_name="us-east-1")
    iam.create_user(UserName="reader")
    rights = {"Effect": "Allow", "Action": "s3:*", "Resource": f"arn:aws:s3:::{bucket}/open/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [rights]})
    iam.put_user_policy(UserName="reader", PolicyName="p", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    reset("0")
    try:
        yield {"id": key["AccessKeyId"], "secret": key["SecretAccessKey"]}
    finally:
        reset("inf")
        iam.delete_access_key(UserName="reader", AccessKeyId=key["AccessKeyId"])
        iam.delete_user_policy(UserName="reader", PolicyName="p")
        iam.delete_user(UserName="reader")


def test_credentials(store, bucket, guarded, monkeypatch):
    text = refused(f"s3://{bucket}/open/a.txt")
    assert "the credentials were refused (InvalidAccessKeyId)" in text
    assert "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY." in text
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", guarded["id"])
    assert "the credentials were refused (SignatureDoesNotMatch)" in refused(f"s3://{bucket}/open/a.txt")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", guarded["secret"])
    text = refused(f"s3://{bucket}/closed/a.txt")
    assert "access was denied (AccessDenied)" in text
    assert guarded["secret"] not in text


def test_older_names_of_environment_variables(store, bucket, monkeypatch):
    store.put(bucket, {"a.txt": b"content"})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("S3_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("CLOUD_REGION", "eu-west-1")
    text = refused(f"s3://{bucket}/a.txt")
    assert "no credentials were found" in text
    assert "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE." in text
    monkeypatch.setenv("ACCESS_KEY", "old")
    assert "ACCESS_KEY is set, but SECRET_KEY is not" in refused(f"s3://{bucket}/a.txt")
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    assert fetch(f"s3://{bucket}/a.txt").read_bytes() == b"content"
    filesystem = open_filesystem(f"s3://{bucket}")
    assert (filesystem.key, filesystem.secret, filesystem.endpoint_url) == ("old", "hunter2", store.endpoint)
    assert filesystem.client_kwargs["region_name"] == "eu-west-1"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "new")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://standard:1")
    filesystem = open_filesystem(f"s3://{bucket}")
    assert (filesystem.key, filesystem.secret, filesystem.endpoint_url) == ("new", "s", "http://standard:1")


def test_unreachable_endpoint(store, monkeypatch):
    with socket.socket() as listener:  # bound, but nobody listens
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hunter2@127.0.0.1:{listener.getsockname()[1]}")
        text = refused("s3://bucket/a")
    assert "the server cannot be reached" in text
    assert "Check AWS_ENDPOINT_URL (http://127.0.0.1:" in text


def test_server_that_does_not_respond(wire, monkeypatch):
    monkeypatch.setattr(filesystem, "ANSWER_LIMIT", 0.3)
    wire.stalled = True
    assert "s3://bucket/a: the server did not answer in time" in refused("s3://bucket/a")
    began = time.monotonic()
    with pytest.raises(DataError, match="the server did not answer in time"):
        list_files("s3://bucket/a")  # a complete listing may take minutes
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "the credentials were refused (401)"),
        (403, "access was denied (403)"),
        (404, "There is nothing at"),
        (500, "the server failed (500)"),
        (503, "Try again later"),
    ],
)
def test_http_errors(web, status, text):
    web.status = status
    shown = refused(f"{web.url.replace('//', '//user:hunter2@')}/set.zip?X-Signature=topsecret")
    assert text in shown
    assert f"{web.url}/set.zip?..." in shown


def test_missing_package_of_the_gs_extra():
    text = refused("gs://bucket/set.zip")
    assert "gs:// needs gcsfs; missing: gcsfs." in text
    assert "pip install 'openmae[gs]'" in text


def test_missing_package_of_the_s3_extra(monkeypatch, clean_environment):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError) as caught:
        open_filesystem("s3://bucket/set.zip")
    assert caught.value.problem.endswith(":// needs s3fs; missing: s3fs.")
    assert caught.value.fix == "pip install 'openmae[s3]'"
