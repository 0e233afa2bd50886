"""``python -m swa_core.cli``: the command ``swa`` where scripts are not on the path."""

import sys

from swa_core.cli import main

sys.exit(main())
