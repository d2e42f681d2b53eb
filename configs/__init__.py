"""YAML run configurations and their schema."""
