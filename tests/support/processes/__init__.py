"""Code that runs in separate processes: ranks, programs, a browser."""
