"""``python -m dartfx``."""

import sys

from dartfx.cli.main import main

sys.exit(main())
