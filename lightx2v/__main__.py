"""`python -m lightx2v` is the `lightx2v` command."""

from __future__ import annotations

import sys

from lightx2v.cli import main

sys.exit(main())
