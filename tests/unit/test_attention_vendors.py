"""What the adapters pass to the packages of attention kernels, without their GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v import doctor
from lightx2v.attention import hub, sage, sparge
from lightx2v.attention.base import ATTENTION, Needs, unavailable
from lightx2v.attention.quantized import smooth
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.errors import LightX2VError
from lightx2v.platform import DeviceInfo
from tests.contracts import attention
from tests.contracts.vendors import CALLS

HOPPER = DeviceInfo("cuda", 0, "an H100", (9, 0), 1 << 36, 1 << 36)

#: Backend, the fake that it calls, and what it must give that beside q, k and v.
EXACT = [
    ("flash_attn2", "flash_attn2", {"causal": False}),
    ("flash_attn3", "flash_attn3", {"causal": False}),
    ("flash_attn4", "flash_attn4", {"causal": False}),
    ("sage_attn2", "sageattn", {"tensor_layout": "NHD", "is_causal": False}),
    ("sage_attn2_k_int8_v_fp8", "sage_fp8", {"qk_quant_gran": "per_thread", "pv_accum_dtype": "fp32+fp32"}),
    ("sage_attn3", "sageattn3", {"is_causal": False}),
    ("xformers", "xformers", {"p": 0.0}),
    ("sparge_attn", "sparge", {"topk": 0.5, "is_causal": False}),
    ("flash_attn2_hub", "flash_attn2", {"causal": False}),
    ("flash_attn3_hub", "flash_attn3", {"causal": False}),
    ("flash_attn4_hub", "flash_attn4", {"causal": False}),
    ("sage_attn2_hub", "sageattn", {"tensor_layout": "NHD", "is_causal": False}),
]


def qkv(queries: int = 130, keys: int = 140, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """As a model has them: keys and values are parts of wider tensors."""
    torch.manual_seed(0)
    q = torch.randn(2, queries, 3, dim, dtype=torch.bfloat16)
    both = torch.randn(2, keys, 2, 3, dim, dtype=torch.bfloat16)
    return q, both[:, :, 0], both[:, :, 1]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("name", "fake", "given"), EXACT)
def test_adapters_pass_what_the_package_wants(
    name: str, fake: str, given: dict[str, object], scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.install(monkeypatch)
    q, k, v = qkv()
    before = k.clone()
    got = ATTENTION[name].fn(q, k, v, scale=scale)
    called = [call for call in CALLS if call.name != "get_kernel"]
    assert [call.name for call in called] == [fake]
    assert given.items() <= {key: called[0].given.get(key) for key in given}.items()
    wanted = torch_sdpa(q.double(), k.double(), v.double(), scale=scale)
    assert got.shape == q.shape and got.dtype == q.dtype
    assert (got.double() - wanted).norm() <= 0.01 * wanted.norm()
    assert torch.equal(k, before), "the caller's keys were written into"


def test_hopper_and_blackwell_get_their_own_kernels_of_sageattention(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch)
    for capability, fake, granularity in (
        ((9, 0), "sage_fp8_sm90", "per_thread"),
        ((8, 9), "sage_fp8", "per_thread"),
        ((12, 0), "sage_fp8", "per_warp"),
    ):
        CALLS.clear()
        monkeypatch.setattr(sage, "compute_capability", lambda device, capability=capability: capability)
        ATTENTION["sage_attn2_k_int8_v_fp8"].fn(*qkv())
        assert [(call.name, call.given["qk_quant_gran"]) for call in CALLS] == [(fake, granularity)]


def test_flash_attn3_in_fp8_gets_scales_per_head_and_smoothed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch)
    q, k, v = qkv()
    k = k + 8 * torch.randn(1, 1, 3, 64).bfloat16()
    got = ATTENTION["flash_attn3_fp8"].fn(q, k, v, scale=0.1)
    given = CALLS[-1].given
    assert given["q"].dtype == torch.float8_e4m3fn and given["q_descale"].shape == (2, 3)
    keys = given["k"].float() * given["k_descale"][:, None, :, None]
    assert (keys - smooth(k).float()).norm() <= 0.04 * smooth(k).float().norm()
    assert given["k"].float().abs().amax() == 448
    wanted = torch_sdpa(q.double(), k.double(), v.double(), scale=0.1)
    assert got.dtype == q.dtype and (got.double() - wanted).norm() <= 0.06 * wanted.norm()


def test_sparse_blocks_are_those_whose_means_are_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch)
    q, k, v = qkv(300, 333)
    blocks = sparge.closest_blocks(q, k, 0.5, 128, 64)
    assert blocks.shape == (2, 3, 3, 6) and bool((blocks.sum(-1) == 3).all())
    keys = k.double() - k.double().mean(1, keepdim=True)
    for row in range(3):
        query = q[1, row * 128 : (row + 1) * 128, 2].double().mean(0)
        scores = torch.stack([query @ keys[1, i * 64 : (i + 1) * 64, 2].mean(0) for i in range(6)])
        assert set(blocks[1, 2, row].nonzero()[:, 0].tolist()) == set(scores.topk(3).indices.tolist())
    ATTENTION["spas_sage_attn2"].fn(q, k, v)
    assert int(CALLS[-1].given["mask_id"].sum()) == 2 * 3 * 3  # a fifth of six blocks, in every row
    monkeypatch.setattr(sparge, "compute_capability", lambda device: (9, 0))
    with pytest.raises(AssertionError):  # the fake has the blocks of other GPUs than Hopper's
        ATTENTION["spas_sage_attn2"].fn(q, k, v)


def test_downloaded_kernels_are_fetched_once_and_only_where_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch)
    backend = ATTENTION["flash_attn3_hub"]
    assert "allow_download is false" in str(unavailable("flash_attn3_hub", HOPPER, "bfloat16"))
    assert unavailable("flash_attn3_hub", HOPPER, "bfloat16", Needs(allow_download=True)) is None
    assert backend.load is not None
    backend.load()
    backend.fn(*qkv())
    fetched = [call.given for call in CALLS if call.name == "get_kernel"]
    assert fetched == [{"repo_id": "kernels-community/flash-attn3", "version": 1}]
    monkeypatch.setitem(attention.HUB, "kernels-community/flash-attn3", None)
    hub.fetch.cache_clear()
    with pytest.raises(LightX2VError, match="kernels-community/flash-attn3: the kernel could not be had"):
        backend.load()
    attention.hide(monkeypatch)
    assert "kernels is not installed (pip install kernels)" in str(
        unavailable("flash_attn3_hub", HOPPER, "bfloat16", Needs(allow_download=True))
    )


def test_doctor_lists_every_backend_with_reason_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch, "sageattention:sageattn", "kernels:get_kernel", version="1.0.6")
    monkeypatch.setattr(doctor, "list_devices", lambda: [HOPPER])
    found = {"version": "1.0.6", "reason": None, "install": None, "needs": None}
    imported: list[str] = []

    def library(module: str, needs: str | None = None) -> dict[str, str | None]:
        """As if the import of what there is had succeeded in a process of its own."""
        imported.append(module)
        return found if module == "sageattention" else real(module, needs)

    real = doctor._library
    monkeypatch.setattr(doctor, "_library", library)
    torch_entry: dict[str, str | None] = {"version": "2.13.0", "reason": None, "install": None, "needs": None}
    entries = doctor._attention(torch_entry, [HOPPER])
    assert list(entries) == list(ATTENTION)
    assert entries["sage_attn2"]["version"] is None and "1.0.6 is too old" in str(entries["sage_attn2"]["reason"])
    assert entries["flash_attn3"]["reason"] == "not installed" and "hopper" in str(entries["flash_attn3"]["install"])
    assert entries["sage_attn3"]["needs"] == "an NVIDIA GPU of compute capability 12.0 to 12.1"
    assert entries["flash_attn3_hub"]["version"] == "downloads kernels-community/flash-attn3"
    assert entries["cpu_flash"] == {
        "version": None,
        "reason": "no device here can run it",
        "install": None,
        "needs": "a CPU",
    }
    assert entries["torch_sdpa"]["version"] == entries["fp8_ref"]["version"] == "2.13.0"
    for entry in entries.values():
        assert bool(entry["version"]) != bool(entry["reason"])
        assert bool(entry["reason"]) == bool(entry["install"] or entry["needs"])
    assert imported.count("flash_attn_interface") == imported.count("sageattention") == 1
