"""The builders of tiny models, by relation: each file names models, nothing else does."""
