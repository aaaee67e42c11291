"""Evaluation of models on data sets."""
