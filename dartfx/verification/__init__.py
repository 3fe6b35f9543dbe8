"""``dartfx.verify``: compares the pruned model with the same selection by masks."""
