"""`python -m lightx2v.infer`: LightX2V's command line, the same as `lightx2v generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightx2v.cli import run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Generate with the given flags; returns the exit code."""
    return run_verb("generate", "python -m lightx2v.infer", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
