"""The benchmarks of what averaging costs, joined: one table, its history, what became slower."""
