"""Helpers and fixtures that several test folders share."""
