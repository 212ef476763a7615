"""The snippets of docs/from_angelslim.md, run as they stand on a tiny FLUX.1 pipeline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.flux_dirs import build_pipeline

PAGE = Path(__file__).parents[2] / "docs" / "from_angelslim.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("angelslim")
    build_pipeline("schnell").save_pretrained(folder / "FLUX.1-schnell")
    return folder


def test_the_page_has_its_snippets() -> None:
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["quantize", "export", "layers"])
def test_a_snippet_runs(snippet: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    sizes = {'"cuda"': '"cpu"', "1024": "32", "max_sequence_length=256": "max_sequence_length=16"}
    for there, here in sizes.items():
        snippet = snippet.replace(there, here)
    exec(compile(snippet, str(PAGE), "exec"), {})
    if "image.save" in snippet:
        assert (folder / "flux-schnell_fp8_per_tensor.png").stat().st_size > 100
    if "export_quantized_weight" in snippet:
        assert {path.name for path in (folder / "flux-fp8").iterdir()} == {
            "config.json",
            "diffusion_pytorch_model.safetensors",
            "fp8_scales.safetensors",
        }
