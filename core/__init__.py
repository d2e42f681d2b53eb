"""What to skip: policies, rules, gates and surrogates, as data and pure functions of tensors."""
