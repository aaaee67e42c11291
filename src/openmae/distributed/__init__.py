"""Processes of a run: topology, launching, collectives, signals, sharding."""
