"""Prints the relative error of every stored example: `python -m tests.interop.errors`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightx2v.io.dialects.open import DIALECTS
from tests.interop import stored


def main() -> None:
    for package in DIALECTS:
        for variant in stored.variants(package):
            folder = stored.DATA / package / variant
            with tempfile.TemporaryDirectory() as root:
                model = stored.load(stored.model_dir(folder, Path(root))).model
            given = stored.example(folder)
            error = stored.relative_error(stored.run(model, given), given["output"])
            print(f"{package}/{variant}: {error:.1e}")


if __name__ == "__main__":
    main()
