"""Exported programs: ``dartfx.prune_exported``, also for C++ packages."""
