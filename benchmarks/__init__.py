"""Figures of this project that anyone can print: `python -m benchmarks`, or one table by its name."""
