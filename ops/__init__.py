"""Device ops, for whoever captures a pass: each a torch reference, a Triton kernel and a launcher."""
