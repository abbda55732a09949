"""Measures the engine: throughput, latency beside its roofline, and the README's tables from committed results.

Run it as ``python bench.py`` at the root; ``--help`` names the modes. Nothing in the engine imports this package.
"""
