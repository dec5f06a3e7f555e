"""The commands of ``lowrank-ops``, one module or folder each; _cli and _data hold what several share."""
