"""``python -m dartfx``: one module per command."""
