"""``dartfx.verify``: the pruned model against the same selection by masks."""
