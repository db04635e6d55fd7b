"""Benchmarks and their result files. `python -m bench` lists them; `runner.py` runs them; `report.py` writes the docs."""
