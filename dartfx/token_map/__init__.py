"""Which vision tokens were kept, and where in the image."""
