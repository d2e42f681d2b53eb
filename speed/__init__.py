"""How fast a model decodes with FFN blocks skipped, against the full model."""
