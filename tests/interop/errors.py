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
            output = stored.run(model, given)
            print(f"{package}/{variant}: {stored.relative_error(output, given['output']):.1e}")
            if package == "angelslim":
                rounded = stored.example(folder.with_name(f"{variant}-bfloat16"))["output"]
                between = stored.relative_error(given["output"], rounded)
                moved = stored.run(model, given, stored.BFLOAT16_GUIDANCE)
                print(f"  its model of bfloat16: {stored.relative_error(output, rounded):.1e}; ", end="")
                print(f"with the guidance of bfloat16 {stored.relative_error(moved, rounded):.1e}; ", end="")
                print(f"its own in float32 {between:.1e}")


if __name__ == "__main__":
    main()
