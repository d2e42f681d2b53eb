"""Checkpoints for engines without skipcal: a model from which the FFNs of a fixed set are left out."""
