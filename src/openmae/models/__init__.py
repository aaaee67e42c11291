"""Masked autoencoders and classifiers: encoders, decoders, masks."""
