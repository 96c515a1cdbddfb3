"""Measurements of the engine itself: what its ways to save time and memory cost and give."""
