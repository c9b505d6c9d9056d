"""``python -m curvlib.cli``."""

from __future__ import annotations

import sys

from curvlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
