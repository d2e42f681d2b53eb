"""Where a model's FFN blocks are: a table of families, a structural fallback, a numerical proof."""
