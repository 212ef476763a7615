"""`--to` gives files that the packages themselves wrote back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightx2v.convert.cli import main
from lightx2v.io.dialects.quanto import MAPS
from tests.interop import stored

QUANTO = [name for name in stored.variants("quanto") if not name.startswith("diffusers")]


def model_type(folder: Path) -> str:
    return "flux_dit" if stored.family_of(folder).name == "flux" else "wan_dit"


@pytest.mark.parametrize(
    ("package", "variant"), [*(("quanto", name) for name in QUANTO), ("angelslim", "wan")], ids="-".join
)
def test_a_package_gets_its_own_file_back(package: str, variant: str, tmp_path: Path) -> None:
    folder = stored.DATA / package / variant
    flags = ["--source", str(folder), "--output", str(tmp_path), "--model_type", model_type(folder)]
    assert main([*flags, "--to", package]) == 0
    theirs, got = load_file(folder / stored.WEIGHTS), load_file(tmp_path / stored.WEIGHTS)
    assert got.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("._shift"):  # our zero point is shift / scale
            torch.testing.assert_close(got[name], tensor, rtol=2**-22, atol=0)
        else:
            assert torch.equal(got[name].float(), tensor.float()), name
        assert got[name].dtype == tensor.dtype or name.endswith(("_scale", "_shift"))
    if package == "quanto":
        wanted = next(json.loads((folder / name).read_text()) for name in MAPS if (folder / name).is_file())
        assert json.loads((tmp_path / MAPS[0]).read_text()).keys() == wanted.keys()


@pytest.mark.parametrize(
    ("package", "variant", "to"),
    [("bitsandbytes", "nf4", "quanto"), ("compressed_tensors", "int4-g32-asym", "msmodelslim")],
)
def test_what_another_package_cannot_hold(
    package: str, variant: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored.DATA / package / variant
    assert main(["--source", str(folder), "--output", str(tmp_path / "out"), "--to", to]) == 2
    assert "allowed: int8" in capsys.readouterr().err and not (tmp_path / "out").exists()
