"""What the vision tower in front of a decoder shows of its tokens."""
