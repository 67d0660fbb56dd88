"""Reproducible measurements: `python -m benchmarks --help`. Never imported by the product."""
