"""Distributed training: topology, launching, collectives, signals and sharding."""
