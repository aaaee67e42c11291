"""The sections of the spec, a module each."""
