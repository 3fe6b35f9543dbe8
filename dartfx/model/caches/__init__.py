"""How dartfx.compile handles the KV caches of transformers."""
