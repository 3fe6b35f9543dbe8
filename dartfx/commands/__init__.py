"""Commands of ``python -m dartfx`` about one model: explain, show, doctor."""
