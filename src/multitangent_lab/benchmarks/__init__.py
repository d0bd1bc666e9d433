"""Benchmarks: what a step costs beside backpropagation and beside what a user would write."""

from multitangent_lab.benchmarks._command import run_bench

__all__ = ["run_bench"]
