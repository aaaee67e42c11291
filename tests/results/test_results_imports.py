"""Importing the package is fast."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration


def test_no_heavy_package_is_imported_before_it_is_used() -> None:
    code = (
        "import sys; from openmae.results import images, metrics_csv, profile, report, search_section, status; "
        "print(sorted({'torch', 'matplotlib', 'sklearn', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
