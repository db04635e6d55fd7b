"""Benchmarks and their result files: `python -m bench` lists them, runs them, and writes the docs from them."""
