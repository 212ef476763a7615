from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v.attention.base import ATTENTION, AUTO_ORDER, NO_ADAPTER, Needs, select_attention, too_old, unavailable
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.errors import ConfigError
from lightx2v.platform import DeviceInfo
from tests.contracts import attention
from tests.numerics.attention_definition import exact

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1 << 34, 1 << 33)
HOPPER = DeviceInfo("cuda", 0, "an H100", (9, 0), 1 << 36, 1 << 36)
BLACKWELL = DeviceInfo("cuda", 0, "a B200", (10, 0), 1 << 37, 1 << 37)
ADA = DeviceInfo("cuda", 0, "an RTX 4090", (8, 9), 1 << 34, 1 << 34)
TURING = DeviceInfo("cuda", 0, "a T4", (7, 5), 1 << 34, 1 << 34)
ROCM = DeviceInfo("rocm", 0, "an MI300X", None, 1 << 37, 1 << 37)


def qkv(queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 8, generator=generator) for n in (queries, keys, keys))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["torch_sdpa", "torch_sdpa_math"])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_is_the_formula(name: str, scale: float | None, masked: bool) -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    got = ATTENTION[name].fn(q, k, v, mask=mask, scale=scale)
    torch.testing.assert_close(got.double(), exact(q, k, v, scale, mask), rtol=1e-5, atol=1e-6)


def test_sdpa_runs_the_kernel_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.bfloat16() for x in qkv())
    for name, ran in (("torch_sdpa_flash", "flash"), ("torch_sdpa_math", "math")):
        with torch.profiler.profile() as profile:
            ATTENTION[name].fn(q, k, v)
        called = [event.key for event in profile.key_averages() if "scaled_dot_product" in event.key]
        assert any(ran in key for key in called), called
    assert unavailable("torch_sdpa_cudnn", CPU, "bfloat16") and not unavailable("torch_sdpa_cudnn", HOPPER, "bfloat16")


@pytest.mark.parametrize(
    ("device", "dtype", "wanted"),
    [
        (HOPPER, "bfloat16", "flash_attn3"),
        (HOPPER, "float32", "torch_sdpa"),
        (BLACKWELL, "bfloat16", "flash_attn4"),
        (ADA, "float16", "flash_attn2"),
        (ROCM, "bfloat16", "flash_attn2"),
        (TURING, "float16", "torch_sdpa"),
        (CPU, "bfloat16", "cpu_flash"),
        (CPU, "float32", "torch_sdpa"),
    ],
)
def test_auto_takes_the_best_that_can_run(
    device: DeviceInfo, dtype: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.install(monkeypatch)
    assert select_attention("auto", device, dtype=dtype)[1] == wanted


def test_auto_takes_what_the_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch)
    assert select_attention("auto", HOPPER, needs=Needs(masks=True))[1] == "torch_sdpa"
    assert select_attention("auto", BLACKWELL, needs=Needs(head_dim=192))[1] == "flash_attn2"
    assert select_attention("auto", HOPPER, needs=Needs(head_dim=72))[1] == "flash_attn3"
    assert all(ATTENTION[name].exact for name in AUTO_ORDER)


def test_auto_tells_why_the_better_ones_were_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.hide(monkeypatch)
    fn, name, reason = select_attention("auto", HOPPER)
    assert (fn, name) == (torch_sdpa, "torch_sdpa")
    assert "flash_attn_interface is not installed" in reason and "flash_attn is not installed" in reason
    assert "flash_attn.cute is not installed (pip install flash-attn-4)" in reason


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("flash_attn3", ADA, "needs an NVIDIA GPU of compute capability 9.0, the device is an RTX 4090"),
        ("flash_attn3_fp8", ADA, "compute capability 9.0"),
        ("flash_attn2", HOPPER, "is not installed (pip install"),
        ("flash_attn2", TURING, "compute capability 8.0 or higher, or an AMD GPU"),
        ("flash_attn4", ADA, "9.0 or higher"),
        ("sage_attn2", BLACKWELL, "8.9 to 9.0 or 12.0 to 12.1"),
        ("sage_attn3", BLACKWELL, "12.0 to 12.1"),
        ("xformers", CPU, "needs an NVIDIA GPU"),
        ("cpu_flash", HOPPER, "needs a CPU"),
        ("flash_attn3_hub", HOPPER, "attention.allow_download is false"),
        *((name, CPU, "no adapter in this version") for name in NO_ADAPTER),
    ],
)
def test_a_named_backend_that_cannot_run_is_an_error_unless_fallback_is_set(
    name: str, device: DeviceInfo, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.hide(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        select_attention(name, device)
    assert reason in str(caught.value) and "torch_sdpa" in caught.value.allowed
    _, chosen, why = select_attention(name, device, fallback=True)
    assert chosen == ("cpu_flash" if device is CPU else "torch_sdpa") and name in why and reason in why


@pytest.mark.parametrize(
    ("name", "needs", "reason"),
    [
        ("sage_attn2", Needs(head_dim=160), "takes heads of width 1 to 128 in steps of 1, the model's have 160"),
        ("sage_attn3", Needs(head_dim=96), "takes heads of width 64 or 128"),
        ("flash_attn3_fp8", Needs(head_dim=72), "16 to 256 in steps of 16"),
        ("flash_attn3", Needs(masks=True), "takes no mask that differs between queries or heads"),
        ("sparge_attn", Needs(tokens=80), "takes at least 128 tokens, the run has 80"),
        ("sparge_attn", Needs(part="cross"), "made for the attention of video tokens"),
    ],
)
def test_what_the_model_needs_is_checked_before_loading(
    name: str, needs: Needs, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.install(monkeypatch)
    device = DeviceInfo("cuda", 0, "an RTX 5090", (12, 0), 1 << 35, 1 << 35) if name == "sage_attn3" else HOPPER
    assert reason in str(unavailable(name, device, "bfloat16", needs))
    assert unavailable(name, device, "bfloat16", Needs(head_dim=128, tokens=128)) is None


def test_a_package_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch, "sageattention:sageattn", version="1.0.6")
    reason = unavailable("sage_attn2", HOPPER, "bfloat16")
    assert reason is not None and reason.startswith(
        "sageattention 1.0.6 is too old, 2.0 or newer is needed (pip install"
    )
    assert too_old("1.9.9+cu124", (2, 0)) and not too_old("2.0.1.post1", (2, 0)) and not too_old("unknown", (2, 0))
    # The same name, but a version that lacks the scales per head.
    attention.install(monkeypatch, "flash_attn_interface:flash_attn_func")
    monkeypatch.setattr("flash_attn_interface.flash_attn_func", lambda q, k, v, softmax_scale=None, causal=False: q)
    assert unavailable("flash_attn3", HOPPER, "bfloat16") is None
    assert "not the one that is called here" in str(unavailable("flash_attn3_fp8", HOPPER, "bfloat16"))


@pytest.mark.parametrize("fallback", [False, True])
def test_an_unknown_name_gets_a_suggestion(fallback: bool) -> None:
    with pytest.raises(ConfigError, match="did you mean 'flash_attn3'"):
        select_attention("flash_atn3", CPU, fallback)


def test_every_name_is_registered_once_and_an_alias_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch)
    assert set(AUTO_ORDER) <= set(ATTENTION) and not set(ATTENTION) & set(NO_ADAPTER)
    assert select_attention("sdpa", CPU)[1] == "torch_sdpa" and ATTENTION.canonical("flex_attn") == "flex"
    for name in ATTENTION:  # every one says something about every device, and none raises
        for device in (CPU, HOPPER, ADA, TURING, ROCM):
            reason = unavailable(name, device, "bfloat16", Needs(64, 4096, allow_download=True))
            assert reason is None or len(reason) > 10
