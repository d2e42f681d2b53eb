"""Figures: each takes a profile or a frame and an Axes, and returns the Axes."""
