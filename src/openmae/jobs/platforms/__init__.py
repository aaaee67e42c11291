"""Platforms on which jobs run: this machine, SLURM and Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmae.jobs.platforms.common import Platform
    from openmae.jobs.store import JobStore

PLATFORMS = ("local", "slurm", "ray")


def open_platform(name: str, store: JobStore) -> Platform:
    """Return one of ``PLATFORMS``, without importing the others.

    Raises:
        SpecError: A program or package that the platform needs is not installed.
    """
    if name == "ray":
        from openmae.jobs.platforms.ray import RayPlatform

        return RayPlatform(store)
    if name == "slurm":
        from openmae.jobs.platforms.slurm import SlurmPlatform

        return SlurmPlatform(store)
    from openmae.jobs.platforms.local.platform import LocalPlatform

    return LocalPlatform(store)
