"""``python -m dartfx``."""

import sys

from dartfx.cli import main

sys.exit(main())
