"""What happened, for people and programs; nothing here changes a result."""
