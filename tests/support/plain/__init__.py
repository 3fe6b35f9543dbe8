"""Decoders in plain torch, whose operators are all known to the tests."""
