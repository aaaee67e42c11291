"""``python -m openmae``: the same as ``mae``."""

import sys

from openmae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
