"""Tiny vision-language models of many families, and the oracle that checks pruned ones.

For ``python -m dartfx families`` and the tests; nothing else in dartfx imports it.  Only this
package may name models: it builds unmodified Hugging Face classes from small configurations.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("dartfx.tools.zoo builds models of transformers: pip install 'dartfx[hf]'")
