"""Device ops of the graph engine: each a torch reference, a Triton kernel and a launcher."""
