"""Tensor-parallel graphs: local tensors, placements, a selection that every rank shares."""
