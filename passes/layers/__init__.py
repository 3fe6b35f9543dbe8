"""Layers that are equal, so that they can be compiled once."""
