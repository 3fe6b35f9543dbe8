"""``bench generate``: whole generations, eager, by hooks, plain Inductor and dart."""
