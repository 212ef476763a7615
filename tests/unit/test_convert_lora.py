from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v.convert.slabs import SLAB_ELEMENTS
from lightx2v.quant.numerics import quantize_weight
from lightx2v.quant.spec import INT8_CHANNEL
from tests.unit.convert_data import read, run, wan, write_wan

RANK = 4
LAYER = "blocks.1.cross_attn.q"
SUFFIXES = [
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
]
PREFIXES = ["", "diffusion_model.", "transformer.", "base_model.model.", "base_model.model.transformer."]
NAMES = [f"{prefix}{name}" for prefix in PREFIXES for name in (LAYER, "blocks.1.attn2.to_q")]
NAMES += ["lora_unet_blocks_1_cross_attn_q", "lora_unet_blocks_1_attn2_to_q", "blocks.1.attn2.processor.to_q"]


def low_rank(seed: int = 1, shape: tuple[int, int] = (24, 24)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, shape[1], generator=generator), torch.randn(shape[0], RANK, generator=generator)


def lora_file(path: Path, name: str = LAYER, suffixes: tuple[str, str] = SUFFIXES[0], **extra: Tensor) -> Path:
    down, up = low_rank()
    path.parent.mkdir(exist_ok=True)
    save_file({name + suffixes[0]: down, name + suffixes[1]: up, **extra}, path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_wan(tmp_path / "model", wan(dtype=torch.float32))


def merged(source: Path, out: Path, *flags: str, layer: str = LAYER) -> Tensor:
    """What was added to a layer, after a check that every other tensor is as it was."""
    assert run(source, out, *flags) == 0
    before, after = wan(dtype=torch.float32), read(out)
    assert all(torch.equal(after[name], before[name]) for name in before if name != f"{layer}.weight")
    return after[f"{layer}.weight"] - before[f"{layer}.weight"]


@pytest.mark.parametrize("suffixes", SUFFIXES, ids=lambda pair: pair[0])
@pytest.mark.parametrize("name", [NAMES[0], NAMES[-3]])
def test_suffixes(source: Path, tmp_path: Path, name: str, suffixes: tuple[str, str]) -> None:
    path = lora_file(tmp_path / "lora.safetensors", name, suffixes)
    down, up = low_rank()
    torch.testing.assert_close(merged(source, tmp_path / "out", "--lora_path", str(path)), up @ down)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_prefixes_and_layouts(tmp_path: Path, name: str, layout: str) -> None:
    source = write_wan(tmp_path / "model", wan(dtype=torch.float32), layout)
    path = lora_file(tmp_path / "lora.safetensors", name)
    down, up = low_rank()
    torch.testing.assert_close(merged(source, tmp_path / "out", "--lora_path", str(path)), up @ down)


@pytest.mark.parametrize(
    ("in_file", "flags", "scale"),
    [
        (None, (), 1.0),
        (2.0, (), 2 / RANK),
        (None, ("--lora_alpha", "8"), 8 / RANK),
        (2.0, ("--lora_alpha", "8"), 2 / RANK),
        (2.0, ("--lora_strength", "0.5"), 0.5 * 2 / RANK),
        (None, ("--lora_alpha", "8", "--lora_strength", "-1"), -8 / RANK),
    ],
)
def test_alpha_and_strength(
    source: Path, tmp_path: Path, in_file: float | None, flags: tuple[str, ...], scale: float
) -> None:
    alpha = {} if in_file is None else {f"{LAYER}.alpha": torch.tensor(in_file)}
    path = lora_file(tmp_path / "lora.safetensors", LAYER, SUFFIXES[2], **alpha)
    down, up = low_rank()
    added = merged(source, tmp_path / "out", "--lora_path", str(path), *flags)
    torch.testing.assert_close(added, scale * (up @ down))


def test_alpha_of_a_peft_directory(source: Path, tmp_path: Path) -> None:
    path = lora_file(tmp_path / "peft" / "adapter_model.safetensors", f"base_model.model.{LAYER}")
    (path.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": RANK}))
    down, up = low_rank()
    added = merged(source, tmp_path / "out", "--lora_path", str(path.parent))
    torch.testing.assert_close(added, 12 / RANK * (up @ down))


def test_differences(source: Path, tmp_path: Path) -> None:
    before = wan(dtype=torch.float32)
    changed = {
        "diffusion_model.blocks.0.ffn.0.diff": "blocks.0.ffn.0.weight",
        "diffusion_model.blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.diff_m": "blocks.0.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.diff_m": "head.modulation",
    }
    deltas = {key: torch.randn_like(before[name]) for key, name in changed.items()}
    save_file(deltas, tmp_path / "lora.safetensors")
    flags = ("--lora_path", str(tmp_path / "lora.safetensors"), "--lora_strength", "0.5")
    assert run(source, tmp_path / "out", *flags) == 0
    after = read(tmp_path / "out")
    for key, name in changed.items():
        torch.testing.assert_close(after.pop(name), before[name] + 0.5 * deltas[key])
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_several_add_up_before_quantizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLAB_ELEMENTS, "cpu", 5 * 24)
    before = wan(dtype=torch.bfloat16)
    source = write_wan(tmp_path / "model", before)
    first, second = lora_file(tmp_path / "a" / "lora.safetensors"), tmp_path / "b.pt"
    down, up = low_rank(2)
    torch.save({f"transformer.{LAYER}.lora_down.weight": down, f"transformer.{LAYER}.lora_up.weight": up}, second)
    flags = ("--lora_path", str(first), str(second), "--lora_strength", "0.7", "-0.2", "--quantized", "--linear_type")
    assert run(source, tmp_path / "out", *flags, "int8", "--verify") == 0
    weight = before[f"{LAYER}.weight"].float() + 0.7 * (low_rank()[1] @ low_rank()[0]) - 0.2 * (up @ down)
    codes, scale = quantize_weight(weight, INT8_CHANNEL)
    after = read(tmp_path / "out")
    torch.testing.assert_close(after[f"{LAYER}.weight_scale"], scale)
    assert (after[f"{LAYER}.weight"].int() - codes.int()).abs().max() <= 1  # the sum's last bit may round otherwise


def test_a_convolution(source: Path, tmp_path: Path) -> None:
    down, up = torch.randn(RANK, 4, 1, 2, 2), torch.randn(24, RANK, 1, 1, 1)
    keys = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    save_file(keys, tmp_path / "lora.safetensors")
    added = merged(source, tmp_path / "out", "--lora_path", str(tmp_path / "lora.safetensors"), layer="patch_embedding")
    torch.testing.assert_close(added, (up.flatten(1) @ down.flatten(1)).view(24, 4, 1, 2, 2))


@pytest.mark.parametrize(
    ("name", "mode", "code"),
    [
        (LAYER, "same", 2),  # the output is diffusers'
        ("blocks.1.attn2.to_q", "same", 0),
        (LAYER, "convert", 0),
        ("blocks.1.attn2.to_q", "convert", 2),
    ],
)
def test_key_convert(source: Path, tmp_path: Path, name: str, mode: str, code: int) -> None:
    path = lora_file(tmp_path / "lora.safetensors", name)
    flags = ("--lora_path", str(path), "--lora_key_convert", mode, "-d", "forward")
    assert run(source, tmp_path / "out", *flags) == code


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"blocks.1.cros_attn.q.lora_A.weight": (4, 24)}, "did you mean 'blocks.1.cross_attn.q.weight'?"),
        ({"lora_te_text_model.lora_down.weight": (4, 24)}, "1 of its 1 keys match nothing in the model"),
        ({f"{LAYER}.lora_down.weight": (4, 24), f"{LAYER}.dora_scale": (24,)}, f"{LAYER}.dora_scale"),
        (
            {"blocks.7.ffn.0.lora_A.weight": (4, 24), "blocks.7.ffn.0.lora_B.weight": (40, 4)},
            "2 of its 2 keys match nothing",
        ),
        ({f"{LAYER}.lora_A.weight": (4, 24)}, "lacks its 'up' half"),
        ({f"{LAYER}.alpha": ()}, "lacks its 'up' half"),
        ({f"{LAYER}.lora_A.weight": (4, 25), f"{LAYER}.lora_B.weight": (24, 4)}, "what adds to a tensor of (24, 24)"),
        ({f"{LAYER}.lora_A.weight": (4, 24), f"{LAYER}.lora_B.weight": (24, 5)}, "(24, 5) @ (4, 24)"),
        ({f"{LAYER}.diff_b": (25,)}, "has the shape (25,)"),
    ],
)
def test_what_does_not_fit_is_an_error(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, tuple[int, ...]], says: str
) -> None:
    save_file({key: torch.ones(shape) for key, shape in keys.items()}, tmp_path / "lora.safetensors")
    assert run(source, tmp_path / "out", "--lora_path", str(tmp_path / "lora.safetensors")) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
