"""Benchmarks: ``python -m bench --device cpu|cuda``. docs/performance.md says what is measured and how."""
