"""What other tools print about a box, read into one vocabulary and put together as a topology."""
