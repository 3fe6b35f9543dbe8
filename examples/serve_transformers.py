"""transformers' OpenAI server with a pruned model; takes the arguments of `transformers serve`.

    pip install "dartfx[hf]" "transformers[serving]"
    export DARTFX_OPTIONS='{"retain_tokens": 64}'
    python examples/serve_transformers.py serve MODEL --port 8000

It compiles every model that the server loads.
"""

from __future__ import annotations

from typing import Any

from transformers.cli.serving import model_manager
from transformers.cli.transformers import app

import dartfx


class CompiledModel(model_manager.TimedModel):
    """The server's record of a loaded model; here it also compiles the model."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(dartfx.compile(model), *args, **kwargs)


if __name__ == "__main__":
    model_manager.TimedModel = CompiledModel
    app()
