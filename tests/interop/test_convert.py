"""The converter writes files of other packages in our layout: every code and scale as the reader gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightx2v.convert.options import Options
from lightx2v.convert.run import convert
from lightx2v.io.declared import declared_layers
from tests.interop import stored


@pytest.mark.parametrize(
    ("package", "variant"),
    [
        ("quanto", "int4"),
        ("bitsandbytes", "nf4"),
        ("bitsandbytes", "flux-nf4-double"),
        ("torchao", "int8-dynamic-whole"),
        ("compressed_tensors", "int4-g32-asym"),
        ("angelslim", "wan"),
    ],
)
def test_codes_are_copied(package: str, variant: str, tmp_path: Path) -> None:
    folder = stored.DATA / package / variant
    family = stored.family_of(folder)
    kind = "flux_dit" if family.name == "flux" else "wan_dit"
    report = convert(Options(source=folder, output=tmp_path, model_type=kind, parallel=False))
    assert report.layers_quantized == 0
    read, written = family.open(folder), family.open(tmp_path)
    wanted = {family.original_name(name): tensor.clone() for name, tensor in read.stream()}
    got = {name: tensor.clone() for name, tensor in written.stream()}
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    # FLUX's parts of a layer are said one by one, and the layer once.
    types = {family.original_name(layer): said for layer, said in declared_layers(read.metadata).items()}
    assert types and declared_layers(written.metadata) == types
