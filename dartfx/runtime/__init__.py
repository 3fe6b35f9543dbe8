"""What runs around compiled code: vision masks, kept indices, caches, agreement between ranks."""
