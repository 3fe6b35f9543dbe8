"""What runs around compiled code: vision masks, kept indices, agreement between ranks."""
