"""`python -m lightx2v.convert`."""

import sys

from lightx2v.convert.cli import main

sys.exit(main(prog="python -m lightx2v.convert"))
