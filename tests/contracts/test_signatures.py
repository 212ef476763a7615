"""The adapters' calls against the vendors' functions: our record of them always, their source where it is at hand.

LIGHTX2V_VENDOR_SOURCES names folders with unpacked packages or clones. A parameter list that is not on record fails
there, so that someone reads what has changed before the record in signatures/ is extended.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from lightx2v.mm import deepgemm, quantizers
from lightx2v.mm.adapter import VendorLibrary
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.vendor import Function
from tests.contracts import attention, vendors
from tests.contracts.sources import folders, pybind_parameters, python_parameters, read_parameters

VENDORS = [library for library in map(LIBRARIES.__getitem__, LIBRARIES) if isinstance(library, VendorLibrary)]
FUNCTIONS: list[Function] = [
    *{id(function): function for vendor in VENDORS for function in vendor.products.values()}.values(),
    *(quantizer.function for quantizer in quantizers._QUANTIZERS.values()),
    deepgemm._ALIGN,
    *attention.FUNCTIONS,
]
FAKES = vendors.FAKES | attention.FAKES
RECORDS: list[dict[str, Any]] = [
    record
    for path in sorted(Path(__file__).with_name("signatures").glob("*.json"))
    for record in json.loads(path.read_text("utf-8"))["records"]
]
NAMES = [f"{record['place']} {record['versions'][0]}" for record in RECORDS]
UNNAMED = 3
"""Arguments that DeepGEMM's product gets, by position alone: their names differ between versions."""


def names(parameters: list[str]) -> list[str]:
    return [parameter.partition("=")[0] for parameter in parameters]


def check(function: Function, parameters: list[str]) -> None:
    """The call must be possible, and fill in everything that has no default."""
    assert function.accepts(names(parameters))
    required = {parameter for parameter in parameters if "=" not in parameter}
    if function.positional:
        assert required <= {*function.positional, *function.keywords, *dict(function.given)}
    else:
        assert len(required) <= UNNAMED


def test_every_function_is_on_record() -> None:
    recorded = {record["place"] for record in RECORDS}
    every = {place for function in FUNCTIONS for place in function.places}
    called = {place for place in every if not place.startswith("lightx2v.")}  # our own kernels in Triton
    # deep_gemm.utils has the helper in versions that do not hand it on.
    assert called - recorded == {"deep_gemm.utils:get_mn_major_tma_aligned_tensor"}
    assert recorded <= called


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
def test_the_call_fits_what_is_on_record(record: dict[str, Any]) -> None:
    for function in FUNCTIONS:
        if record["place"] in function.places:
            check(function, record["parameters"])


def test_a_call_that_does_not_fit_is_noticed() -> None:
    function = Function(("vendor:f",), ("x", "y"), ("out",))
    check(function, ["x", "y", "out=None", "more=1"])
    for parameters in (["y", "x", "out=None"], ["x", "y"], ["x", "y", "out", "more"]):
        with pytest.raises(AssertionError):
            check(function, parameters)


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
def test_the_vendors_source_is_as_recorded(record: dict[str, Any]) -> None:
    place, file = record["place"], record["file"]
    module, _, name = place.partition(":")
    definitions = [found for folder in folders(module.split(".")[0]) for found in read_parameters(folder, file, name)]
    if not definitions:
        pytest.skip(f"{file} is in no folder of LIGHTX2V_VENDOR_SOURCES and not installed")
    known = [other["parameters"] for other in RECORDS if other["place"] == place]
    for parameters in definitions:
        assert parameters in known, f"{place}({', '.join(parameters)}) is not on record"
        for function in FUNCTIONS:
            if place in function.places:
                check(function, parameters)


@pytest.mark.parametrize("place", FAKES, ids=str)
def test_the_fakes_of_other_tests_have_the_vendors_parameters(place: str) -> None:
    signature = inspect.signature(FAKES[place])
    of_fake = [
        name if parameter.default is inspect.Parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in signature.parameters.items()
    ]
    known = [record["parameters"] for record in RECORDS if record["place"] == place]
    # Helpers exported from C++ without names have no parameters on record.
    assert of_fake in known or known == [[], []]


def test_parameters_are_read_from_python_and_from_bindings() -> None:
    python = "def f(a, b: int = 2, *, c=None) -> None: ...\ng = f\nclass T:\n    def f(self): ...\n"
    assert python_parameters(python, "g") == [["a", "b=2", "c=None"], ["self"]]
    bindings = 'm.def("f8", &f8, py::arg("a"), py::arg("c") = std::nullopt, py::arg("dims") = "nk");\n'
    bindings += 'm.attr("f") = m.attr("f8");'
    assert pybind_parameters(bindings, "f") == [["a", "c=None", "dims='nk'"]]
    assert pybind_parameters(bindings, "missing") == python_parameters(python, "missing") == []
