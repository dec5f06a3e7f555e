"""Benchmarks: ``lowrank-ops bench``. docs/performance.md says what is measured and how; ``suite`` is where it starts."""
