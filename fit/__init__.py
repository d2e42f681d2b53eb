"""The fit of gates and surrogates to the damage that a skip does."""
