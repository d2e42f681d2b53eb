"""Device ops, for whoever captures a pass: each a torch reference, a Triton kernel and a launcher.

Of each row of a pass an op is told by a flag, on the device: 1, it skips; 0, it runs; and where flags are
int8, -1: it is nobody's, a row that only pads the pass. Nothing is read or written for it.
"""
