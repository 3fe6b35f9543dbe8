"""What the dropped vision tokens leave behind: means, and weight in attention."""
