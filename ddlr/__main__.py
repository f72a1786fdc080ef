"""``python -m ddlr``: the command `ddlr`, see `ddlr.cli`."""

import sys

from ddlr.cli import main

sys.exit(main())
