"""Find the local inputs of an action, and those that do not exist on this machine."""

from __future__ import annotations

import os
import re

from openmae.data.shards.patterns import expand_braces, is_shard_pattern
from openmae.errors import DataError, blaming
from openmae.spec.actions import ROWS
from openmae.spec.option import KEY_IN_FILE
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.storage.printable import original_name

_SCHEME = re.compile(r"[a-z][a-z0-9]+:", re.IGNORECASE)  # a URL


def local_inputs(spec: ExperimentSpec, action: str) -> dict[str, list[str]]:
    """Return the local paths of the data sources and model files that an action reads, by config key."""
    row = ROWS[action]
    keys = [data.key for data in row.data] + [file.key for file in row.inputs]
    return {key: _places(value_of(spec, key).strip()) for key in keys}


def missing_sources(spec: ExperimentSpec, action: str) -> dict[str, str]:
    """Return the local data sources of an action that do not exist: config key -> problem."""
    return _missing({data.key: (value_of(spec, data.key),) for data in ROWS[action].data})


def missing_files(spec: ExperimentSpec, action: str) -> dict[str, str]:
    """Return the same for checkpoints, exported models, calibration images and the file of the encryption key."""
    paths: dict[str, tuple[str, ...]] = {file.key: (value_of(spec, file.key),) for file in ROWS[action].inputs}
    if action == "gen_trt_engine" and spec.gen_trt_engine.tensorrt.data_type == "int8":
        calibration = spec.gen_trt_engine.tensorrt.calibration
        name = "cal_image_dir" if calibration.cal_image_dir else "images"
        paths[f"gen_trt_engine.tensorrt.calibration.{name}"] = calibration.sources
    if action == "export" and spec.export.quantize == "int8":
        paths["export.calibration.images"] = spec.export.calibration.sources
    if spec.encryption_key.startswith(KEY_IN_FILE):
        paths["encryption_key"] = (spec.encryption_key.removeprefix(KEY_IN_FILE),)
    return _missing(paths)


def refuse_missing(spec: ExperimentSpec, action: str) -> None:
    """Report all missing inputs together; for a single one, the function that opens it has a better message.

    Raises:
        DataError: several inputs do not exist on this machine.
    """
    missing = {**missing_sources(spec, action), **missing_files(spec, action)}
    if len(missing) > 1:
        raise DataError("\n".join(f"{key}: {text}." for key, text in missing.items()), "Check the paths.")


def check_sources(spec: ExperimentSpec, action: str) -> None:
    """Check that the local data sources of an action exist, without opening them.

    Raises:
        DataError: one does not exist.
    """
    from openmae.data.archives import local_source

    for key in missing_sources(spec, action):
        if not is_shard_pattern(value_of(spec, key)):
            with blaming(key):
                local_source(value_of(spec, key).strip())


def _missing(paths: dict[str, tuple[str, ...]]) -> dict[str, str]:
    found = {}
    for key, values in paths.items():
        gone = [path for value in values for path in _places(value.strip()) if not _exists(path)]
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            found[key] = f"there is nothing at {gone[0]!r}{more}"
    return found


def _exists(path: str) -> bool:
    r"""Return whether a path exists, literally or with ``\xhh`` read as a byte that is not UTF-8."""
    return os.path.exists(path) or os.path.exists(original_name(path))


def _places(value: str) -> list[str]:
    if not value or _SCHEME.match(value):
        return []
    try:
        places = expand_braces(value) if is_shard_pattern(value) else [value]
    except DataError:  # opening the source explains the error
        return []
    return [os.path.expanduser(place) for place in places if not _SCHEME.match(place)]
