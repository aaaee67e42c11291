"""Data sources, decoding of images, transforms and loaders."""
