"""The ``mae`` command line."""
