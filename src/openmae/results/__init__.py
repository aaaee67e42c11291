"""Status, metrics, figures and reports of a run.

This package does not import torch, and imports matplotlib and jinja2 only in the functions that need them.
"""
