"""Prefills as CUDA graphs: prompts padded to few lengths, with a recording per length."""
