"""What dartfx.compile does to the KV caches of transformers."""
