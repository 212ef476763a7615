"""The adapters of vendors' libraries against stand-ins that insist on what the real functions insist on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightx2v.mm.adapter import VendorLibrary
from lightx2v.mm.base import Packed
from lightx2v.mm.libraries import LIBRARIES, PRIORITY, unavailable
from lightx2v.mm.reference import LIBRARY as REFERENCE
from lightx2v.mm.scheme import Scheme, parse
from lightx2v.mm.select import plan_layer
from lightx2v.platform import DeviceInfo
from lightx2v.quant.formats import quantize_leaves
from tests.contracts import vendors
from tests.contracts.vendors import CALLS, FAKES
from tests.gpu.checks import Case, check_library

#: A device of compute capability 9.0 whose tensors are in RAM, so that the stand-ins can compute.
HOPPER = DeviceInfo("cpu", 0, "a Hopper GPU", (9, 0), 1, 1)
LONG = "W-{0}-channel-sym-A-{0}-channel-sym-dynamic-{1}"
BLOCK = "W-fp8-block128-sym-A-fp8-channel-group128-sym-dynamic-Deepgemm"
#: mm_type -> the functions that it calls, in order; activations of fp8-torchao and fp8-b128 are quantized in torch.
CASES = {
    "int8-vllm": ["scaled_int8_quant", "cutlass_scaled_mm"],
    "fp8-vllm": ["scaled_fp8_quant", "cutlass_scaled_mm"],
    LONG.format("fp8", "Vllm-ActSgl"): ["sgl_per_token_quant_fp8", "cutlass_scaled_mm"],
    "int8-sgl": ["per_token_quant_int8", "int8_scaled_mm"],
    "fp8-sgl": ["sgl_per_token_quant_fp8", "fp8_scaled_mm"],
    LONG.format("int8", "Sgl-ActVllm"): ["scaled_int8_quant", "int8_scaled_mm"],
    LONG.format("fp8", "Sgl-ActVllm"): ["scaled_fp8_quant", "fp8_scaled_mm"],
    "int8-q8f": ["scaled_int8_quant", "q8_linear"],
    "fp8-q8f": ["scaled_fp8_quant", "fp8_linear"],
    "fp8-b128-deepgemm": ["get_mn_major_tma_aligned_tensor", "fp8_gemm_nt"],
    BLOCK + "-ActSgl": ["sgl_per_token_group_quant_fp8", "get_mn_major_tma_aligned_tensor", "fp8_gemm_nt"],
    "int8-torchao": ["quantize_activation_per_token_absmax", "int_scaled_matmul"],
    "fp8-torchao": ["addmm_float8_unwrapped_inference"],
}
N, K = 256, 384
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    vendors.forget()
    yield
    vendors.forget()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    vendors.install(monkeypatch, FAKES)


def scheme_of(mm_type: str) -> tuple[Scheme, VendorLibrary]:
    scheme = parse(mm_type)
    library = LIBRARIES[scheme.library]
    assert isinstance(library, VendorLibrary)
    return scheme, library


def layer(scheme: Scheme, library: VendorLibrary) -> tuple[Packed, Packed]:
    """The same random weight packed by the library and by the reference."""
    assert scheme.weight is not None
    leaves = quantize_leaves(torch.randn(N, K, generator=torch.Generator().manual_seed(1)), scheme.weight)
    return library.prepare(scheme, leaves), REFERENCE.prepare(scheme, leaves)


def refusal(mm_type: str, device: DeviceInfo = HOPPER, n: int = N, k: int = K) -> str:
    scheme = parse(mm_type)
    return unavailable(scheme.library, scheme, n, k, device) or ""


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("mm_type", CASES)
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_result_is_the_references(mm_type: str, rows: int, with_bias: bool, dtype: torch.dtype) -> None:
    scheme, library = scheme_of(mm_type)
    packed, exact = layer(scheme, library)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[rows // 2] = 0
    bias = torch.arange(N).float() / 16 - 8 if with_bias else None  # float16 and bfloat16 hold it exactly
    got = library.linear(scheme, x, packed, bias)
    called = [call.name for call in CALLS if call.name != "gemm_fp8_fp8_bf16_nt"]
    wanted_calls = CASES[mm_type]
    if dtype == torch.float32 and "ActSgl" in mm_type and "block" in mm_type:
        wanted_calls = wanted_calls[1:]  # sgl-kernel's groups come from 16-bit numbers alone: torch does the others
    assert called == wanted_calls

    rounded = dtype if dtype in library.caps.out_dtypes else torch.bfloat16
    # A product of bfloat16 is rounded before a bias that is added afterwards; torchao's of int8 is not.
    early = library.caps.bias == "after" and scheme.weight is not None and scheme.weight.dtype == "fp8"
    codes = REFERENCE.quantize(scheme, x, exact)
    wanted = REFERENCE.gemm(scheme, codes, exact, None if early else bias, torch.bfloat16 if early else rounded)
    if rounded is not dtype and library.caps.bias == "fused" and bias is not None:
        wanted = (REFERENCE.gemm(scheme, codes, exact, None, rounded).float() + bias).to(dtype)
    if early and bias is not None:
        wanted = (wanted.float() + bias).to(dtype)
    assert got.dtype == dtype and got.shape == (rows, N)
    assert torch.equal(got, wanted.to(dtype))


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("mm_type", CASES)
def test_a_plan_takes_it_and_the_weight_comes_back(mm_type: str) -> None:
    scheme, library = scheme_of(mm_type)
    plan = plan_layer("blocks.0.ffn.0", mm_type, scheme, N, K, device=HOPPER, fallback=False)
    assert plan.library == scheme.library and plan.reason.startswith("named: ")
    packed, exact = layer(scheme, library)
    unpacked, stored = library.unpack(scheme, packed), REFERENCE.unpack(scheme, exact)
    assert unpacked.keys() == stored.keys() and packed.nbytes == exact.nbytes
    assert all(torch.equal(unpacked[leaf].float(), stored[leaf].float()) for leaf in stored)
    assert all(unpacked[leaf].is_contiguous() for leaf in stored)


@pytest.mark.usefixtures("everything")
def test_each_library_gets_the_bias_as_it_wants_it() -> None:
    bias, x = torch.randn(N), torch.randn(5, K).bfloat16()
    taken = {}
    for mm_type in ("fp8-vllm", "fp8-sgl", "fp8-q8f", "fp8-b128-deepgemm", "fp8-torchao"):
        scheme, library = scheme_of(mm_type)
        library.linear(scheme, x, layer(scheme, library)[0], bias)
        given = CALLS[-1].given.get("bias")
        taken[mm_type] = None if given is None else given.dtype
    assert taken == {
        "fp8-vllm": torch.bfloat16,
        "fp8-sgl": torch.bfloat16,
        "fp8-q8f": torch.float32,
        "fp8-b128-deepgemm": None,
        "fp8-torchao": None,
    }


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize("mm_type", ["fp8-b128-deepgemm", BLOCK + "-ActSgl"])
def test_deepgemm_gets_column_major_scales_without_its_helper(
    monkeypatch: pytest.MonkeyPatch, mm_type: str, rows: int
) -> None:
    """As from versions that keep their helper to themselves, under the name of the product of before."""
    vendors.install(
        monkeypatch,
        {
            "deep_gemm:gemm_fp8_fp8_bf16_nt": vendors.gemm_fp8_fp8_bf16_nt,
            "deep_gemm:fp8_gemm_nt": None,
            "deep_gemm:get_mn_major_tma_aligned_tensor": None,
            "sgl_kernel:sgl_per_token_group_quant_fp8": vendors.old_group_quant,
        },
    )
    for name in ("fp8_gemm_nt", "get_mn_major_tma_aligned_tensor"):
        monkeypatch.delattr(f"deep_gemm.{name}", raising=False)
    scheme, library = scheme_of(mm_type)
    packed, exact = layer(scheme, library)
    assert refusal(mm_type) == ""
    x = torch.randn(rows, K).bfloat16()
    got = library.linear(scheme, x, packed, None)
    assert [call.name for call in CALLS][-1] == "gemm_fp8_fp8_bf16_nt"
    assert torch.equal(got, REFERENCE.linear(scheme, x, exact, None))


def test_older_names_and_parameters_serve_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    places = dict(FAKES) | {"vllm._custom_ops:scaled_int8_quant": vendors.old_scaled_int8_quant}
    del places["torchao.quantization.utils:quantize_activation_per_token_absmax"]
    places["torchao.quantization.utils:_quantize_activation_per_token_absmax"] = (
        vendors.quantize_activation_per_token_absmax
    )
    del places["torchao.kernel.intmm:int_scaled_matmul"]
    newest = "torchao.quantization.quantize_.workflows.int8.kernels:_int_scaled_matmul"
    places[newest] = vendors.int_scaled_matmul
    vendors.install(monkeypatch, places)
    assert refusal("int8-vllm") == refusal("int8-torchao") == ""
    words = LIBRARIES["torchao"].describe(parse("int8-torchao"), HOPPER)
    assert words.startswith("_int_scaled_matmul of torchao ") and words.endswith(", activations as torchao does")


def test_int8_of_sgl_is_quantized_in_torch_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    vendors.install(monkeypatch, {place: fake for place, fake in FAKES.items() if place.startswith("sgl_kernel")})
    scheme, library = scheme_of("int8-sgl")
    packed, exact = layer(scheme, library)
    assert refusal("int8-sgl") == ""
    x = torch.tensor([[127.0, 0.5, -2.5, 1.5] + [0.0] * (K - 4)])
    assert library.quantize(scheme, x, packed).codes[0, :4].tolist() == [127, 1, -3, 2]
    assert torch.equal(
        library.linear(scheme, x, packed, None).float(), REFERENCE.linear(scheme, x.bfloat16(), exact, None).float()
    )


def test_a_missing_quantizer_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    vendors.install(monkeypatch, {place: fake for place, fake in FAKES.items() if not place.startswith("vllm")})
    for mm_type in ("fp8-q8f", LONG.format("int8", "Sgl-ActVllm")):
        reason = "activations are quantized by vllm: vllm is not installed (pip install vllm)"
        assert refusal(mm_type) == reason


@pytest.mark.parametrize("mm_type", CASES)
def test_without_the_package_there_is_an_install_command(monkeypatch: pytest.MonkeyPatch, mm_type: str) -> None:
    vendors.hide(monkeypatch)
    assert "is not installed (pip install " in refusal(mm_type)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("mm_type", "capability", "n", "k", "reason"),
    [
        ("fp8-vllm", (8, 6), N, K, "needs compute capability 8.9 or higher, a GPU has 8.6"),
        ("int8-vllm", (10, 0), N, K, "needs compute capability 7.5 to 9.0, a GPU has 10.0"),
        ("int8-sgl", (7, 5), N, K, "8.9 or higher (fp8), a GPU has 7.5"),
        ("fp8-b128-deepgemm", (10, 0), N, K, "needs compute capability 9.0 alone (fp8), a GPU has 10.0"),
        ("fp8-torchao", None, N, K, "needs compute capability 8.9 or higher, a GPU has none"),
        ("fp8-q8f", None, N, K, "needs compute capability 8.9 or higher (int8 and fp8), a GPU has none"),
        ("fp8-vllm", (9, 0), N, 392, "needs K to be a multiple of 16, the layer has 392"),
        ("fp8-sgl", (9, 0), 200, K, "needs N to be a multiple of 16, the layer has 200"),
        ("int8-q8f", (8, 9), 192, K, "needs N to be a multiple of 128, the layer has 192"),
        ("fp8-q8f", (8, 9), N, 96, "needs K to be a multiple of 64, the layer has 96"),
        ("fp8-b128-deepgemm", (9, 0), N, 192, "needs K to be a multiple of 128, the layer has 192"),
        ("W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Deepgemm", (9, 0), N, K, "does not compute this scheme"),
    ],
)
def test_what_a_layer_or_device_lacks_is_said(
    mm_type: str, capability: tuple[int, int] | None, n: int, k: int, reason: str
) -> None:
    assert reason in refusal(mm_type, DeviceInfo("cpu", 0, "a GPU", capability, 1, 1), n, k)


def test_an_older_or_another_package_is_told_from_the_one_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def fp8_linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        raise AssertionError("not to be called")

    def scaled_fp8_quant(input: Tensor, scale: Tensor | None = None) -> Tensor:
        raise AssertionError("not to be called")

    functions = dict(FAKES) | {
        "q8_kernels.functional.linear:fp8_linear": fp8_linear,
        "vllm._custom_ops:scaled_fp8_quant": scaled_fp8_quant,
        "vllm._custom_ops:cutlass_scaled_mm": None,
    }
    vendors.install(monkeypatch, functions, "0.0.5")
    assert refusal("fp8-q8f").startswith(
        "q8_kernels 0.0.5 has a fp8_linear(a, b, bias), not the one that is called here"
    )
    assert (
        refusal("int8-vllm")
        == "vllm 0.0.5 is installed, but has no cutlass_scaled_mm (another version: pip install vllm)"
    )
    assert "quantized by vllm: vllm 0.0.5 has a scaled_fp8_quant(input, scale)" in refusal(
        LONG.format("fp8", "Sgl-ActVllm")
    )


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("mm_type", CASES)
def test_the_trial_refuses_what_computes_wrongly_or_fails(monkeypatch: pytest.MonkeyPatch, mm_type: str) -> None:
    _, library = scheme_of(mm_type)
    multiply = library.multiply
    monkeypatch.setattr(library, "multiply", lambda *args: multiply(*args).flip(1), raising=False)
    assert "its product gives wrong results on this device" in refusal(mm_type)
    vendors.forget()

    def fail(*args: object) -> Tensor:
        raise RuntimeError("no kernel image is available\n  for execution on the device")

    monkeypatch.setattr(library, "multiply", fail)
    expected = f"{library.name} failed on this device: RuntimeError: no kernel image is available for execution"
    assert refusal(mm_type).startswith(expected)


def test_the_trial_refuses_wrong_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(
        input: Tensor, scale: object = None, azp: object = None, symmetric: bool = True
    ) -> tuple[Tensor, Tensor]:
        codes, scales, _ = vendors.scaled_int8_quant(input)
        return codes, scales / 2

    vendors.install(monkeypatch, dict(FAKES) | {"vllm._custom_ops:scaled_int8_quant": halved})
    assert "its quantization of activations gives wrong results" in refusal("int8-vllm")


@pytest.mark.usefixtures("everything")
def test_auto_takes_vendors_in_order_before_torch() -> None:
    order = ["vllm", "sgl", "deepgemm", "q8f", "torchao", "torch_native", "reference"]
    assert [name for name in PRIORITY if name in order] == order
    wanted = {"int8": "vllm", "fp8": "vllm", "fp8-b128": "deepgemm"}
    gpu = DeviceInfo("mps", 0, "a GPU", (9, 0), 1, 1)  # where oneDNN is not; its tensors are not tried
    for mm_type, library in wanted.items():
        scheme = parse(mm_type)
        assert unavailable(library, scheme, N, K, HOPPER) is None
        able = [name for name in PRIORITY if name != "onednn" and unavailable(name, scheme, N, K, HOPPER) is None]
        assert able[0] == library
    assert "computes on CPUs" in (unavailable("onednn", parse("int8"), N, K, gpu) or "")


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("mm_type", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_checks_for_gpus_pass_what_is_right(mm_type: str, dtype: torch.dtype) -> None:
    scheme, library = scheme_of(mm_type)
    for rows, bias in ((1, False), (7, True), (33, True)):
        check_library(library, scheme, Case(rows, N, K, dtype, bias), torch.device("cpu"))


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("mm_type", CASES)
def test_the_checks_for_gpus_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch, mm_type: str) -> None:
    scheme, library = scheme_of(mm_type)
    multiply, quantize = library.multiply, library.quantize
    case, cpu = Case(7, N, K, torch.bfloat16, True), torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(library, "multiply", lambda *args: multiply(*args) * 1.05)
        with pytest.raises(AssertionError, match="results are off"):
            check_library(library, scheme, case, cpu)
    monkeypatch.setattr(
        library, "quantize", lambda *args: quantize(*args)._replace(scale=quantize(*args).scale * 1.001)
    )
    with pytest.raises(AssertionError, match="scales differ"):
        check_library(library, scheme, case, cpu)
