"""Time, memory and planning from a schedule graph; knows no torch."""
