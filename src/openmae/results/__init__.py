"""Everything a user looks at: status and metric logs, pictures, probes and the report.

No torch here, and nothing heavy at import: matplotlib, Pillow and scikit-learn are loaded by the
functions that draw and fit.
"""
