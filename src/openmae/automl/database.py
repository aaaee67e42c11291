"""The storage of a study, in a SQLite file or a PostgreSQL database, and the lock that its workers share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from openmae.errors import SpecError
from openmae.spec.option import KEY_IN_ENVIRONMENT
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout
from openmae.storage.urls import is_remote, redact

STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)

_POSTGRESQL = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 20}}
_SQLITE = {"connect_args": {"timeout": 120}}  # seconds to wait for the lock of the file
# If the machine that holds the lock loses power, the database frees it after a minute instead of two hours.
_KEEPALIVE = ", ".join(f"set_config('tcp_keepalives_{name}', '{value}', true)"
                       for name, value in (("idle", 30), ("interval", 10), ("count", 3)))  # fmt: skip


def read_storage(spec: ExperimentSpec) -> RDBStorage:
    """Open the storage of an existing search.

    Raises:
        SpecError: there is no search, or its storage cannot be used.
    """
    if is_remote(spec.results_folder("automl")) and not spec.automl.storage:
        raise SpecError(
            "results_dir: the dashboard cannot show a search in a remote store.", "Copy study.db to a local folder."
        )
    folder = Path(spec.results_folder("automl"))
    url, shown = storage_url(spec, folder)
    if not spec.automl.storage and not (folder / layout.STUDY).is_file():
        raise SpecError(f"results_dir: there is no search in {folder}.", "Start one: `mae automl -e SPEC`.")
    try:
        return open_storage(url)
    except (*STORAGE_ERRORS, ImportError) as error:
        raise unusable(shown, error) from error


def storage_url(spec: ExperimentSpec, folder: Path) -> tuple[str, str]:
    """Return the SQLAlchemy URL of a spec's storage, and its name in messages, without secrets.

    Raises:
        SpecError: the environment variable for the URL is not set, or the URL is not a PostgreSQL URL.
    """
    text = spec.automl.storage
    if not text:
        path = str(folder / layout.STUDY)
        return sqlalchemy.URL.create("sqlite", database=path).render_as_string(), path
    if text.startswith(KEY_IN_ENVIRONMENT):
        name = text.removeprefix(KEY_IN_ENVIRONMENT)
        text = os.environ.get(name, "")
        if not text:
            raise SpecError(
                f"automl.storage: the environment variable {name} is not set.",
                f"Set {name} to the URL of the database.",
            )
    if not text.startswith("postgresql"):
        raise SpecError("automl.storage: the URL is not a PostgreSQL URL.", "Use postgresql://USER@HOST/DATABASE.")
    scheme, _, rest = text.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme == "postgresql" else text, redact(text)


def open_storage(url: str) -> RDBStorage:
    """Return Optuna's storage at a URL; missing tables are created.

    Raises:
        STORAGE_ERRORS, ImportError: the storage cannot be used.
    """
    if not url.startswith("sqlite"):
        return RDBStorage(url, _POSTGRESQL)
    storage = RDBStorage(url, _SQLITE)

    # Two readers that both want to write would deadlock, so lock the file when a transaction begins, by the recipe in
    # SQLAlchemy's documentation.
    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(storage.engine, "begin")
    def began(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # existing connections lack these handlers
    return storage


def make_lock(url: str, folder: Path) -> Callable[[str], AbstractContextManager[Any]]:
    """Return a function that makes the lock of a name; the lock is freed if the process that holds it is killed."""
    if url.startswith("sqlite"):
        return lambda name: FileLock(folder / f".{layout.STUDY}.lock")
    engine = sqlalchemy.create_engine(url, **_POSTGRESQL)

    @contextmanager
    def lock(name: str) -> Iterator[None]:
        key = int.from_bytes(hashlib.sha256(f"openmae {name}".encode()).digest()[:8], "big", signed=True)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT {_KEEPALIVE}")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({key})")
            yield

    return lock


def reason(error: BaseException) -> str:
    """Return the first line of the database's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def unusable(shown: str, error: Exception) -> SpecError:
    """Return the error for a storage that cannot be opened."""
    problem = f"{shown} cannot be used: {reason(error).rstrip('.')}."
    if shown.endswith(layout.STUDY):
        return SpecError(
            f"results_dir: {problem}",
            "Free space if the disk is full, or restore the file from a backup. Otherwise move its folder away; the "
            "search then starts from the beginning.",
        )
    return SpecError(
        f"automl.storage: {problem}",
        "Check the URL, the user and the database; `pip install 'openmae[automl]'` installs the PostgreSQL driver.",
    )
