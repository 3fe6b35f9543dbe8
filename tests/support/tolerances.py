"""Constants of the tests of pruned models: tolerances, and numbers of kept tokens."""

from __future__ import annotations

import torch

# Two ways of computing the same model differ by rounding only, which grows with every layer.
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.1},
}
CLOSE = TOLERANCES[torch.float32]

# Two eager models with logits of order 1: a misplaced token moves them by 0.1, rounding by 1e-6.
EAGER = {"rtol": 0.0, "atol": 1e-5}
# Decoders of two or three small layers.
SMALL_DECODER = {"rtol": 1e-4, "atol": 1e-5}
# Attention that tokens receive, computed by numpy in float64: of one layer, of a compiled model.
ATTENTION = {"rtol": 1e-5, "atol": 1e-7}
COMPILED_ATTENTION = {"rtol": 1e-4, "atol": 1e-6}
# Under autocast to bfloat16: outputs of small decoders, gradients of a family.
AUTOCAST = {"rtol": 0.0, "atol": 0.02}
AUTOCAST_GRADIENTS = {"rtol": 0.0, "atol": 2e-3}
# Logits of vLLM against transformers', by dtype.
VLLM = {
    torch.float32: {"rtol": 0.0, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.0, "atol": 0.35},
}
# Pixels of a processor against those of the training program.
PIXELS = {"rtol": 1e-5, "atol": 1e-5}
# Log-likelihoods, relative: a batch against each row, a prompt against its tokens one by one.
LIKELIHOOD, LIKELIHOOD_BY_STEPS = 1e-4, 1e-3

# Vision tokens kept per row of the tiny families, which have 16 or more of them.
RETAIN = 6
