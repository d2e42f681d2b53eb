"""Skipping models under lm-eval."""
