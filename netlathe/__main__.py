"""``python -m netlathe``: the command where its script is not on the path."""

from __future__ import annotations

import sys

from netlathe.cli import main

sys.exit(main())
