"""``lowrank-ops scaling fit`` and ``scaling plan``: run.py is the command, plots.py what it draws."""
