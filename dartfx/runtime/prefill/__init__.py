"""Prefills as CUDA graphs: prompts padded to few lengths, and a recording for each of them."""
