"""Tensor-parallel graphs: local tensors, placements, one selection on all ranks."""
