"""``python -m impact_optim``: see :mod:`impact_optim.experiments.cli`."""

import sys

from .experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
