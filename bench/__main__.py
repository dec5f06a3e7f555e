"""python -m lowrank_ops.bench: the same as lowrank-ops bench."""

import sys

from .suite import main

if __name__ == "__main__":
    sys.exit(main())
