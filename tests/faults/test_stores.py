"""A store that becomes unreachable while results are uploaded to it."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer
from tests.helpers.fault_runs import PLAIN, Server, until

SECRETS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
SCALE = 10  # a minute is six seconds
OUTAGE = 60 / SCALE
FASTER = {
    **PLAIN,
    **{
        f"openmae.storage.mirror:{name}": seconds / SCALE
        for name, seconds in {
            "STATUS_SECONDS": 20,
            "GROWING_SECONDS": 30,
            "_LOOK_SECONDS": 1,
            "_RETRY_SECONDS": 15,
            "_PATIENCE_SECONDS": 90,
        }.items()
    },
}


class Store:
    """An S3 server that keeps its content when it is stopped and started."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()
        urlopen(f"{self.url}/moto-api/reset", data=b"").close()  # its content belongs to the process, not to the server
        self.client = boto3.client("s3", endpoint_url=self.url)
        self.client.create_bucket(Bucket="runs")

    def start(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        serving = self.server._server
        assert serving is not None
        serving.app = _complete_bodies(serving.app)

    def stop(self) -> None:
        self.server.stop()

    def drop_incomplete(self) -> None:
        """Delete objects that are not what was sent. S3 refuses them by their checksum, but moto keeps them."""
        for name in self.names():
            found = self.client.get_object(Bucket="runs", Key=f"one/{name}")
            expected = [found["ETag"].strip('"'), *found["Metadata"].values()]
            digest = hashlib.md5(found["Body"].read()).hexdigest()
            if any(len(text) == len(digest) and text.isalnum() and text != digest for text in expected):
                self.client.delete_object(Bucket="runs", Key=f"one/{name}")

    def names(self) -> set[str]:
        found = self.client.list_objects_v2(Bucket="runs").get("Contents", [])
        return {item["Key"].removeprefix("one/") for item in found}

    def last_status(self) -> str:
        text = self.client.get_object(Bucket="runs", Key="one/status.json")["Body"].read().decode()
        return json.loads(text.splitlines()[-1])["status"]


def _complete_bodies(app: Any) -> Any:
    """Refuse a request whose body ends early, as S3 does; moto would store the part that has arrived."""

    def call(environ: dict[str, Any], start_response: Any) -> Any:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if length else b""
        if len(body) < length:
            start_response("400 IncompleteBody", [("Content-Length", "0")])
            return [b""]
        return app({**environ, "wsgi.input": BytesIO(body)} if length else environ, start_response)

    return call


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    served = Store()
    yield served
    served.stop()


def _arguments(store: Store, photos: Path, epochs: int) -> dict[str, Any]:
    return {
        "results": "s3://runs/one",
        "source": photos,
        "changes": {"train.num_epochs": epochs},
        "patch": FASTER,
        "environment": {**SECRETS, "AWS_ENDPOINT_URL": store.url},
    }


FINISHED = {"status.json", "metrics.csv", "report.html", "backbone.safetensors", "model_best.pth"}


def test_a_store_that_is_down_for_a_minute_gets_everything(server: Server, photos: Path, store: Store) -> None:
    training = server.start(**_arguments(store, photos, 25))
    until(lambda: any(name.startswith("model_epoch") for name in store.names()), training, "the first upload")
    store.stop()
    time.sleep(OUTAGE)
    assert training.alive(), training.text
    store.start()
    assert training.code() == 0, training.text
    assert store.names() >= FINISHED, training.text
    assert "model_epoch_025_step_00125.pth" in store.names()
    assert store.last_status() == "SUCCESS"


def test_a_store_that_stays_down_fails_the_run_which_can_be_resumed(server: Server, photos: Path, store: Store) -> None:
    training = server.start(**_arguments(store, photos, 6))
    until(lambda: any(name.startswith("model_epoch") for name in store.names()), training, "the first upload")
    store.stop()
    code = training.code()
    store.start()
    store.drop_incomplete()
    assert code == 1, training.text
    assert "could not be uploaded to s3://runs/one" in training.text
    assert "Traceback" not in training.text
    assert store.last_status() != "SUCCESS"
    assert server.start(**_arguments(store, photos, 6)).code() == 0
    assert store.names() >= {*FINISHED, "model_epoch_006_step_00030.pth"}
    assert store.last_status() in ("SUCCESS", "SKIPPED")
