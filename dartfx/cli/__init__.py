"""``python -m dartfx``: one module a command."""
