"""Engines: the ways to run a model's blocks under a skip rule, all with the same result."""
