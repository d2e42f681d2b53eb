"""The methods that FFN-SkipLLM is compared with, all asked for by a target skip ratio."""
