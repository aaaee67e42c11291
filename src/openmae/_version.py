"""Version of OpenMAE."""

__version__ = "0.1.0"
