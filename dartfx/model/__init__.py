"""A user's model: ``dartfx.compile``, ``explain`` and the compiled call."""
