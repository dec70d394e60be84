"""``python -m privtuner`` is the command ``privtuner``."""

from __future__ import annotations

import sys

from privtuner.cli import main

if __name__ == "__main__":
    sys.exit(main())
