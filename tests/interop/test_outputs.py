"""Files of other packages load here, and the model gives what the package's own gave on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v.config.schema import Config
from lightx2v.foreign.build import empty_model, load_denoiser
from lightx2v.foreign.index import read_pipeline
from lightx2v.foreign.plan import _plan_denoiser
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import DIALECTS, open_any
from tests.interop import stored

STORED = [(package, variant) for package in DIALECTS for variant in stored.variants(package)]
WAN = [(package, variant) for package, variant in STORED if "flux" not in variant and package != "angelslim"]
"""With inputs and results of single layers; AngelSlim's scale is that of all tokens, of which a few are stored."""
LIMIT = 1e-3
TIPPED = {
    # The largest value of a row lies on a tie (127.5), so that the last bit of the row decides over a step of its code.
    ("torchao", "int8-dynamic-whole"): 5e-3,
    # Inputs become float16 first, whose values lie on ties more often.
    ("bitsandbytes", "int8"): 3e-3,
}
"""Where codes of inputs tip over in a model this narrow."""
LAYER_LIMIT = 5e-5


def folder_of(package: str, variant: str) -> Path:
    return stored.DATA / package / variant


@pytest.mark.parametrize(("package", "variant"), STORED)
def test_the_output_is_the_package_s_own(package: str, variant: str, tmp_path: Path) -> None:
    folder = folder_of(package, variant)
    loaded = stored.load(stored.model_dir(folder, tmp_path))
    assert any(layer.mm_type != "Default" for layer in loaded.plan.layers)
    given = stored.example(folder)
    error = stored.relative_error(stored.run(loaded.model, given), given["output"])
    assert error < TIPPED.get((package, variant), LIMIT)


@pytest.mark.parametrize(("package", "variant"), STORED)
def test_weights_are_what_the_package_takes_them_for(package: str, variant: str) -> None:
    opened = open_any(folder_of(package, variant), Wanted(lambda layer: False))
    given = stored.example(folder_of(package, variant))
    weights = {name: tensor for name, tensor in given.items() if name.endswith(".weight")}
    assert weights
    for name, rows in weights.items():
        assert stored.relative_error(opened.load(name)[: rows.shape[0]], rows) < 1e-6, name


@pytest.mark.parametrize(("package", "variant"), WAN)
def test_each_layer_gives_what_the_package_s_gave(package: str, variant: str, tmp_path: Path) -> None:
    folder = folder_of(package, variant)
    loaded, family = stored.load(stored.model_dir(folder, tmp_path)), stored.family_of(folder)
    given = stored.example(folder)
    results = [name for name in given if name.endswith(".result")]
    assert results
    for name in results:
        layer = name.removesuffix(".result")
        with torch.no_grad():
            got: Tensor = loaded.model.get_submodule(family.original_name(layer))(given[f"{layer}.input"])
        assert stored.relative_error(got, given[name]) < LAYER_LIMIT, layer


@pytest.mark.parametrize(("variant", "guidance"), [("wan", stored.GUIDANCE), ("flux", stored.BFLOAT16_GUIDANCE)])
def test_from_angelslim_s_bfloat16_only_rounding_parts_us(variant: str, guidance: float, tmp_path: Path) -> None:
    folder = folder_of("angelslim", variant)
    model, given = stored.load(stored.model_dir(folder, tmp_path)).model, stored.example(folder)
    theirs = stored.example(folder.with_name(f"{variant}-bfloat16"))["output"]
    assert stored.relative_error(stored.run(model, given, guidance), theirs) < 1.5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inputs_have_angelslim_s_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its fp8_per_tensor_quant: 448 / amax in the dtype of the input, of which the stored scale is the reciprocal."""
    model = stored.load(stored.model_dir(folder_of("angelslim", "wan"), tmp_path)).model
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    multiplier = (448 / x.abs().amax()).to(dtype)
    codes = model.get_submodule("blocks.0.self_attn.q").quantize(x)
    wanted = (x * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.codes.view(torch.uint8), wanted.view(torch.uint8))
    assert codes.scale.item() == pytest.approx(multiplier.float().reciprocal().item(), rel=2**-23)


@pytest.mark.parametrize(
    ("package", "variant"), [("quanto", "int4"), ("torchao", "int8-dynamic"), ("bitsandbytes", "nf4")]
)
def test_a_pipeline_of_diffusers_reads_them_too(package: str, variant: str, tmp_path: Path) -> None:
    folder = folder_of(package, variant)
    root = stored.model_dir(folder, tmp_path)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (root / "model_index.json").write_text(json.dumps(index))
    (part,) = read_pipeline(root).denoisers
    config = Config(model_cls="diffusers", model_path=str(root), mm_config={"mm_type": "auto"})  # type: ignore[arg-type]
    planned = _plan_denoiser(part, empty_model(part), config, stored.CPU)
    model = load_denoiser(part, planned, torch.device("cpu"), torch.float32)
    given = stored.example(folder)
    with torch.no_grad():
        output = model(given["latents"], given["timestep"], F.pad(given["text"], (0, 0, 0, 504))).sample
    assert stored.relative_error(output, given["output"]) < LIMIT
