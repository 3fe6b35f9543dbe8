"""Decoders in plain torch, of which the tests know every operator."""
