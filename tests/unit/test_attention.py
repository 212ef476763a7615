from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightx2v.attention.base import ATTENTION, AUTO_ORDER, NO_ADAPTER, select_attention
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.errors import ConfigError, LightX2VError
from lightx2v.platform import DeviceInfo

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1 << 34, 1 << 33)
HOPPER = DeviceInfo("cuda", 0, "an H100", (9, 0), 1 << 36, 1 << 36)
ADA = DeviceInfo("cuda", 0, "an RTX 4090", (8, 9), 1 << 34, 1 << 34)
MODULES = {"flash_attn3": "flash_attn_interface", "flash_attn2": "flash_attn"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both flash attention packages are there; they note their calls and compute in torch."""
    calls: list[str] = []
    for name, module_name in MODULES.items():
        module = ModuleType(module_name)

        def flash_attn_func(
            q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, name: str = name
        ) -> Tensor | tuple[Tensor, Tensor]:
            calls.append(name)
            out = torch_sdpa(q, k, v, scale=softmax_scale)
            return (out, q[..., 0]) if name == "flash_attn3" else out

        module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module_name, module)
    return calls


def qkv(queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 8, generator=generator) for n in (queries, keys, keys))  # type: ignore[return-value]


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_is_the_formula(scale: float | None, masked: bool) -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    scores = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) * (scale or 8**-0.5)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    wanted = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(torch_sdpa(q, k, v, mask=mask, scale=scale).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_flash_adapters_compute_the_same_and_refuse_masks(name: str, installed: list[str]) -> None:
    fn, chosen, _ = select_attention(name, HOPPER)
    q, k, v = qkv()
    assert chosen == name
    assert torch.equal(fn(q, k, v, scale=0.3), torch_sdpa(q, k, v, scale=0.3))
    assert installed == [name]
    with pytest.raises(LightX2VError, match="takes no mask"):
        fn(q, k, v, mask=torch.ones(5, 7, dtype=torch.bool))


@pytest.mark.parametrize(
    ("device", "dtype", "wanted"),
    [
        (HOPPER, "bfloat16", "flash_attn3"),
        (HOPPER, "float32", "torch_sdpa"),
        (ADA, "float16", "flash_attn2"),
        (CPU, "bfloat16", "cpu_flash"),
        (CPU, "float32", "torch_sdpa"),
    ],
)
def test_auto_takes_the_best_that_can_run(device: DeviceInfo, dtype: str, wanted: str, installed: list[str]) -> None:
    assert select_attention("auto", device, dtype=dtype)[1] == wanted


def test_auto_tells_why_the_better_ones_were_not_taken() -> None:
    fn, name, reason = select_attention("auto", HOPPER)
    assert (fn, name) == (torch_sdpa, "torch_sdpa")
    assert "flash_attn3: not installed" in reason and "flash_attn2: not installed" in reason


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("flash_attn3", ADA, "compute capability 9.0"),
        ("flash_attn2", HOPPER, "not installed (pip install"),
        ("flash_attn2", CPU, "needs an NVIDIA or AMD GPU"),
        *((name, CPU, "no adapter in this version") for name in NO_ADAPTER),
    ],
)
def test_a_named_backend_that_cannot_run_is_an_error_unless_fallback_is_set(
    name: str, device: DeviceInfo, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        select_attention(name, device)
    assert reason in str(caught.value) and "torch_sdpa" in caught.value.allowed
    _, chosen, why = select_attention(name, device, fallback=True)
    assert chosen == ("cpu_flash" if device is CPU else "torch_sdpa") and name in why and reason in why


@pytest.mark.parametrize("fallback", [False, True])
def test_an_unknown_name_gets_a_suggestion(fallback: bool) -> None:
    with pytest.raises(ConfigError, match="did you mean 'flash_attn3'"):
        select_attention("flash_atn3", CPU, fallback)


def test_every_name_is_registered_once_and_an_alias_is_resolved() -> None:
    assert set(ATTENTION) == set(AUTO_ORDER) and not set(ATTENTION) & set(NO_ADAPTER)
    assert select_attention("sdpa", CPU)[1] == "torch_sdpa"
