"""What runs around compiled code: vision masks, keep_idx, recordings, agreement between ranks."""
