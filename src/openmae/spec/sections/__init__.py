"""The sections of the spec, one module each."""
