"""What runs in processes of its own: ranks, programs, a browser."""
