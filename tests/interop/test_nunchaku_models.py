"""Files of nunchaku's own models: the engine's output is that of their formulas in float64, in diffusers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from lightx2v.config.schema import Config
from lightx2v.errors import CheckpointError
from lightx2v.foreign.build import empty_model, load_denoiser
from lightx2v.foreign.index import read_pipeline
from lightx2v.foreign.plan import _plan_denoiser
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from tests.data.interop import tiny
from tests.interop import nunchaku_files as files
from tests.interop import nunchaku_models, stored

WIDTH, LIMIT = 128, 1e-3


def example(model: Any) -> dict[str, Tensor]:
    return tiny._flux_example(model, torch.float32)


def written(folder: Path, model: Any, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True)
    model.save_config(folder)
    save_file(tensors, folder / stored.WEIGHTS, metadata)
    return folder


def foreign(root: Path, pipeline: str, model_class: str) -> Any:
    """The transformer in `root` as model_cls diffusers runs it."""
    index = {"_class_name": pipeline, "transformer": ["diffusers", model_class]}
    (root / "model_index.json").write_text(json.dumps(index))
    (part,) = read_pipeline(root).denoisers
    config = Config(model_cls="diffusers", model_path=str(root), mm_config={"mm_type": "auto"})  # type: ignore[arg-type]
    planned = _plan_denoiser(part, empty_model(part), config, stored.CPU)
    return load_denoiser(part, planned, torch.device("cpu"), torch.float32), planned


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A file, and the example that the formulas give."""
    model = tiny.flux(width=WIDTH)
    tensors = nunchaku_models.flux(model)
    with torch.no_grad():
        return written(tmp_path_factory.mktemp("nunchaku") / "flux", model, tensors), example(model)


def test_flux(flux: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, given = flux
    loaded = stored.load(stored.model_dir(folder, tmp_path))
    types = {layer.name: layer.mm_type for layer in loaded.plan.layers}
    assert types["double_blocks.0.img_attn.qkv"] == types["single_blocks.0.linear1"] == "int4-w4a4"
    assert types["double_blocks.0.txt_mlp.2"] == types["single_blocks.0.linear2"] == "int4-g64"
    assert types["double_blocks.0.img_mod.lin"] == "int4-g64-asym"
    error = stored.relative_error(stored.run(loaded.model, given), given["output"])
    assert error < LIMIT, error


def test_flux_in_diffusers(flux: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, given = flux
    model, planned = foreign(stored.model_dir(folder, tmp_path), "FluxPipeline", "FluxTransformer2DModel")
    types = {layer.name: layer.mm_type for layer in planned.layers}
    assert types["transformer_blocks.0.attn.add_k_proj"] == types["single_transformer_blocks.0.proj_mlp"] == "int4-w4a4"
    with torch.no_grad():
        error = stored.relative_error(example(model)["output"], given["output"])
    assert error < LIMIT, error


def test_qwen_image_in_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(32, 16, 16),
    ).eval()
    tiny._randomize(model)
    tensors = nunchaku_models.qwen(model)
    folder = written(tmp_path / "tiny", model, tensors, {"model_class": "NunchakuQwenImageTransformer2DModel"})
    loaded, planned = foreign(stored.model_dir(folder, tmp_path / "model"), "QwenImagePipeline", type(model).__name__)
    types = {layer.name: layer.mm_type for layer in planned.layers}
    assert types["transformer_blocks.0.img_mlp.net.2"] == "int4-g64"
    given = {
        "hidden_states": torch.randn(1, 12, 16),
        "encoder_hidden_states": torch.randn(1, 8, 24),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 3, 4)]],
    }
    with torch.no_grad():
        error = stored.relative_error(loaded(**given).sample, model(**given).sample)
    assert error < LIMIT, error


def test_projections_of_nvfp4_keep_the_factors_of_their_own(tmp_path: Path) -> None:
    factors, name = (0.5, 0.25, 2.0), "transformer_blocks.0.attn"
    weights = [torch.randn(128, 256, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    parts = [files.nvfp4_weight(weight, factor / 64) for weight, factor in zip(weights, factors, strict=True)]
    codes, scales = (torch.cat([part[i].view(torch.uint8) if i else part[i] for part in parts]) for i in (0, 1))
    smooth = (torch.rand(256, generator=torch.Generator().manual_seed(9)) + 0.5).bfloat16()
    rows = torch.tensor(factors).repeat_interleave(128).bfloat16() / 64
    leaves = {
        "qweight": files.packed_codes(codes),
        "wscales": files.packed_micro_scales(scales.view(torch.float8_e4m3fn)),
        "wcscales": files.packed_vector(rows),
        "smooth_factor": files.packed_vector(smooth),
        "bias": files.packed_vector(torch.arange(384).bfloat16()),
    }
    path, said = tmp_path / "model.safetensors", {"model_class": "NunchakuQwenImageTransformer2DModel"}
    save_file({f"{name}.to_qkv.{leaf}": tensor.contiguous() for leaf, tensor in leaves.items()}, path, said)
    held, floats = (open_any(path, Wanted(lambda layer, keep=keep: keep)) for keep in (True, False))
    for index, (part, factor) in enumerate(zip("qkv", factors, strict=True)):
        assert float(held.load(f"{name}.to_{part}.weight_global_scale")) == 64 / factor
        of_codes, scale = parts[index]
        values = files.E2M1_CODES[of_codes] * scale.double().repeat_interleave(16, dim=1) * factor / 64
        error = stored.relative_error(floats.load(f"{name}.to_{part}.weight"), values / smooth.double())
        assert error < 1e-6
        assert torch.equal(floats.load(f"{name}.to_{part}.bias"), bias_of(index))


def bias_of(index: int) -> Tensor:
    return torch.arange(384).bfloat16()[128 * index : 128 * index + 128]


def test_two_smoothings_of_one_layer_are_refused(flux: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    root = stored.model_dir(flux[0], tmp_path)
    name = "single_transformer_blocks.0.mlp_fc1.smooth"
    stored.edit(root, lambda tensors, metadata, config: tensors.update({name: 2 * tensors[name]}))
    with pytest.raises(CheckpointError, match="qkv_proj' has a smoothing of its own for each"):
        stored.load(root)


def test_nvfp4_of_flux_is_refused(tmp_path: Path) -> None:
    codes, scale = files.nvfp4_weight(torch.randn(384, 128), 1.0)
    leaves = {
        "qweight": files.packed_codes(codes),
        "wscales": files.packed_micro_scales(scale),
        "smooth": files.packed_vector(torch.ones(128).bfloat16()),
    }
    path = tmp_path / "model.safetensors"
    save_file({f"transformer_blocks.0.qkv_proj.{leaf}": tensor for leaf, tensor in leaves.items()}, path)
    with pytest.raises(CheckpointError, match=r"'transformer_blocks\.0' is of nvfp4"):
        open_any(path, Wanted(lambda layer: True))
