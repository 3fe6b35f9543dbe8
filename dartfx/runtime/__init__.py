"""What runs beside compiled code: vision masks, kept indices, agreement between ranks."""
