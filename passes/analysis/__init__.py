"""Read-only: where to cut, and which dimensions are the token axis."""
