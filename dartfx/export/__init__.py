"""Exported programs: ``dartfx.prune_exported`` and what a C++ package needs."""
