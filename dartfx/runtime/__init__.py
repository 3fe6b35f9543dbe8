"""Runtime support around compiled code: vision masks, keep_idx, recordings, rank agreement."""
