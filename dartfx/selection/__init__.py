"""DART and the other built-in selectors, the batch rule and the registry."""
