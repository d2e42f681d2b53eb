"""Ops of a decode step that skips: each a torch reference, Triton kernels and a launcher of one name."""
