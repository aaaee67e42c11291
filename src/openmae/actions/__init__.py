"""The actions of ``mae``, one module each."""
