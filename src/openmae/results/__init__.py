"""Everything that users look at: status, metrics, figures and reports.

Nothing here imports torch, and matplotlib and jinja2 are only imported by the functions that need them.
"""
