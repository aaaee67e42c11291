"""The actions of ``mae``, a module each."""
