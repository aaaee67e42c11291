"""Evaluate models on data sets."""
