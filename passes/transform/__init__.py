"""Rewrites of a normalised graph, in place."""
