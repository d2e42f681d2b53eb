"""The host for vLLM: FFNs are skipped where many requests run in one batch."""
