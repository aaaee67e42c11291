"""Serve a trained model over HTTP: ``mae serve``."""
