"""Benchmarks: ``lowrank-ops bench``. docs/benchmarking.md tells what is measured and how; the command is in ``suite``."""
