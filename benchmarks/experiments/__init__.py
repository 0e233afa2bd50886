"""The experiments: whether averaging helps, on real data, over seeds, in every framework."""
