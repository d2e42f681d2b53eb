"""Profiles side by side."""
