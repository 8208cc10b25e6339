"""Benchmarks, one script a question: `python -m bench.NAME`."""
