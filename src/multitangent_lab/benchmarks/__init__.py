"""Benchmarks: what a step costs beside backpropagation and beside what a user would write."""
