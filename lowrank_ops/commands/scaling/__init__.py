"""``lowrank-ops scaling fit`` and ``scaling plan``: run.py has the commands, plots.py their plots."""
