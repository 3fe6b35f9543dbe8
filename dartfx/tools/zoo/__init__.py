"""Tiny vision-language models of many families, and the oracle that pruned ones are compared with.

For ``python -m dartfx families`` and the tests; nothing else in dartfx imports it.  This is the one
place that may name models: it builds untouched Hugging Face classes from small configurations.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("dartfx.tools.zoo builds models of transformers: pip install 'dartfx[hf]'")
