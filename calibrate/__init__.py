"""From a model and a text to a profile: corpora, capture, saturation, regions, recommend."""
