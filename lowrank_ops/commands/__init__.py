"""The words of ``lowrank-ops``, a module or folder each; what several share is in _cli and _data."""
