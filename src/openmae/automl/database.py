"""Where a study is kept: a file of SQLite, or PostgreSQL; and whose turn it is there."""

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

_ENGINE = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 20}}
_PATIENCE = 120  # seconds that a worker waits for its turn at a file
# A machine that lost its power in its turn holds the others up for a minute, not for the two hours of the default.
_KEEPALIVE = ", ".join(f"set_config('tcp_keepalives_{name}', '{value}', true)"
                       for name, value in (("idle", 30), ("interval", 10), ("count", 3)))  # fmt: skip


def stored(spec: ExperimentSpec) -> RDBStorage:
    """The storage that holds the search of a spec.

    Raises:
        SpecError: there is no search.
    """
    if is_remote(spec.results_folder("automl")) and not spec.automl.storage:
        raise SpecError("results_dir: a search in a store cannot be looked at.", "Copy study.db to a folder.")
    folder = Path(spec.results_folder("automl"))
    url, shown = storage_url(spec, folder)
    if not spec.automl.storage and not (folder / layout.STUDY).is_file():
        raise SpecError(f"results_dir: there is no search in {folder}.", "Begin one: `mae automl -e SPEC`.")
    try:
        return open_storage(url)
    except (*STORAGE_ERRORS, ImportError) as error:
        raise unusable(shown, error) from error


def storage_url(spec: ExperimentSpec, folder: Path) -> tuple[str, str]:
    """The URL of the storage that a spec asks for, for SQLAlchemy and (without secrets) for people.

    Raises:
        SpecError: a variable that it stands in is not set, or it is of another database.
    """
    text = spec.automl.storage
    if not text:
        path = str(folder / layout.STUDY)
        return sqlalchemy.URL.create("sqlite", database=path).render_as_string(), path
    if text.startswith(KEY_IN_ENVIRONMENT):
        name = text.removeprefix(KEY_IN_ENVIRONMENT)
        if not os.environ.get(name):
            raise SpecError(
                f"automl.storage: the variable {name} is not set.", f"Set {name} to the URL of the database."
            )
        text = os.environ[name]
    if not text.startswith("postgresql"):
        raise SpecError("automl.storage: the URL is not one of PostgreSQL.", "Give postgresql://USER@HOST/DATABASE.")
    scheme, _, rest = text.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme == "postgresql" else text, redact(text)


def open_storage(url: str) -> RDBStorage:
    """Optuna's storage at a URL, its tables made where there are none.

    Raises:
        STORAGE_ERRORS, ImportError: it cannot be used.
    """
    if not url.startswith("sqlite"):
        return RDBStorage(url, _ENGINE)
    storage = RDBStorage(url, {"connect_args": {"timeout": _PATIENCE}})

    # Two readers that both want to write would block one another: take the turn at the beginning (SQLAlchemy's recipe).
    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(storage.engine, "begin")
    def began(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # connections made before this know nothing of it
    return storage


def turns(url: str, folder: Path) -> Callable[[str], AbstractContextManager[Any]]:
    """What gives a worker its turn at something, alone; the system or the database frees it when its holder dies."""
    if url.startswith("sqlite"):
        return lambda what: FileLock(folder / f".{layout.STUDY}.lock")
    engine = sqlalchemy.create_engine(url, **_ENGINE)

    @contextmanager
    def turn(what: str) -> Iterator[None]:
        key = int.from_bytes(hashlib.sha256(f"openmae {what}".encode()).digest()[:8], "big", signed=True)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT {_KEEPALIVE}")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({key})")
            yield

    return turn


def reason(error: BaseException) -> str:
    """What the database itself said, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def unusable(shown: str, error: Exception) -> SpecError:
    """What to say of a storage that cannot be opened."""
    what = f"{shown} cannot be used: {reason(error).rstrip('.')}."
    if shown.endswith(layout.STUDY):
        return SpecError(
            f"results_dir: {what}",
            "Make room where the disk is full, or restore the file from a copy. Else move its folder away: the search "
            "then begins anew.",
        )
    return SpecError(
        f"automl.storage: {what}",
        "Check the URL, the user and the database; `pip install 'openmae[automl]'` brings PostgreSQL's driver.",
    )
