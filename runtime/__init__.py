"""Decoding with FFN blocks skipped: policy, rule, engines, session, report."""
