"""A profile as one HTML file: its curves, regions, operating points, tokens and provenance."""
