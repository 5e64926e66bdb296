"""What a trace says: attribution of time, and plans and boxes in words."""
