"""Hyperparameter search: Optuna proposes trials, and each of them is a training job."""

import importlib.util

from openmae.errors import UserError

_PACKAGES = ("optuna", "sqlalchemy", "cmaes")

# Every module of this package needs them, so check once, when the first module is imported.
if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
    raise UserError(
        f"`mae automl` needs {', '.join(_PACKAGES)}; missing: {', '.join(missing)}.",
        "pip install 'openmae[automl]'",
    )
