"""Benchmarks: ``lowrank-ops bench``. docs/benchmarking.md says what is measured and how; ``suite`` is where it starts."""
