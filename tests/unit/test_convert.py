from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightx2v.convert.cli import main
from lightx2v.convert.options import LINEAR_TYPES
from lightx2v.convert.slabs import SLAB_ELEMENTS
from lightx2v.convert.writer import open_output
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint
from lightx2v.quant.numerics import quantize_weight
from tests.unit.convert_data import CONFIG, LAYERS, read, run, wan, write_wan

INDEX = "diffusion_pytorch_model.safetensors.index.json"
INT8 = ("--quantized", "--linear_type", "int8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_wan(tmp_path / "model", wan())


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-b128"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_codes_scales_and_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, layout: str) -> None:
    monkeypatch.setitem(SLAB_ELEMENTS, "cpu", 1)  # slabs of 128 rows, the smallest
    tensors = wan(dim=200, ffn=300)
    source = write_wan(tmp_path / "model", tensors, layout)
    assert run(source, tmp_path / "out", "--quantized", "--linear_type", scheme) == 0
    result = read(tmp_path / "out")
    quantized = {f"blocks.{index}.{layer}.weight" for index in range(2) for layer in LAYERS}
    assert result.keys() == tensors.keys() | {f"{name}_scale" for name in quantized}
    for name, tensor in tensors.items():
        if name in quantized:
            codes, scale = quantize_weight(tensor, LINEAR_TYPES[scheme])
            assert torch.equal(result[name].view(torch.uint8), codes.view(torch.uint8)), name
            assert torch.equal(result[f"{name}_scale"], scale), name
        else:
            assert torch.equal(result[name], tensor.float()) and result[name].dtype == torch.float32, name


@pytest.mark.parametrize(
    ("flags", "files"),
    [
        (("--save_by_block",), {"block_0.safetensors", "block_1.safetensors", "non_block.safetensors", INDEX}),
        (("-c", "30", "-o_n", "w"), {*(f"w_part{part}.safetensors" for part in (1, 2, 3)), INDEX}),
        (("--single_file", "--output_name", "w"), {"w.safetensors"}),
        (("-o_e", ".pth", "-o_n", "w"), {"w.pth"}),
    ],
)
def test_output_forms(source: Path, tmp_path: Path, flags: tuple[str, ...], files: set[str]) -> None:
    out = tmp_path / "out"
    assert run(source, out, *INT8, *flags) == 0
    assert {path.name for path in out.iterdir()} == {*files, "config.json"}
    opened = Checkpoint.open(out if INDEX in files else out / next(iter(files)))
    assert run(source, tmp_path / "whole", *INT8, "--single_file") == 0
    whole = load_file(tmp_path / "whole" / "converted.safetensors")
    assert opened.tensors.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in opened.stream())
    if INDEX in files:
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
        assert all((out / file).is_file() for file in index["weight_map"].values())
        for name in whole:
            if name.endswith("_scale"):  # a weight and its scale are in one file
                assert index["weight_map"][name] == index["weight_map"][name.removesuffix("_scale")]


def test_chunks_hold_no_more_than_asked(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out", "-c", "7") == 0
    sizes = [len(load_file(file)) for file in (tmp_path / "out").glob("*_part*.safetensors")]
    assert max(sizes) == 7 and sum(sizes) == len(wan())


def test_metadata_describes_the_scheme(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", *INT8, "--save_by_block", "--non_linear_dtype", "torch.bfloat16")
    with safe_open(tmp_path / "out" / "block_1.safetensors", "pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("blocks.1.norm3.weight").dtype == torch.bfloat16
        assert file.get_tensor("blocks.1.ffn.0.weight_scale").dtype == torch.float32
    layers = json.loads(metadata["quantization"])["layers"]
    assert layers == {f"blocks.1.{layer}": "W-int8-channel-sym" for layer in LAYERS}
    assert (metadata["format_version"], metadata["model_type"], metadata["layout"]) == ("1", "wan_dit", "original")
    assert metadata["source_hash"].startswith("sha256:") and metadata["tool"].startswith("lightx2v ")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG


def test_both_directions_are_inverse(source: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "diffusers", tmp_path / "back"
    assert run(source, there, "-d", "forward") == 0
    assert "condition_embedder.text_embedder.linear_1.weight" in read(there)
    described = json.loads((there / "config.json").read_text())
    assert (described["_class_name"], described["num_attention_heads"]) == ("WanTransformer3DModel", 2)
    assert run(there, back, "-d", "backward", "-b") == 0
    result = read(back)
    assert all(torch.equal(result.pop(name), tensor) for name, tensor in wan().items()) and not result
    described = json.loads((back / "config.json").read_text())
    assert {key: described[key] for key in CONFIG} == CONFIG


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_text_encoder(tmp_path: Path, ending: str) -> None:
    tensors = {"token_embedding.weight": torch.randn(50, 16), "norm.weight": torch.randn(16)}
    tensors |= {"blocks.0.attn.q.weight": torch.randn(16, 16), "blocks.0.ffn.gate.0.weight": torch.randn(32, 16)}
    tensors |= {"blocks.0.pos_embedding.embedding.weight": torch.randn(32, 4)}
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "models_t5.pth")
    flags = (
        "-t",
        "wan_t5",
        "--linear_dtype",
        "torch.float8_e4m3fn",
        "--non_linear_dtype",
        "torch.bfloat16",
        "--quantized",
    )
    names = ("-o_e", ending, "-o_n", "models_t5-fp8", "--single_file", "--verify")
    assert run(tmp_path / "models_t5.pth", tmp_path / "fp8", *flags, *names) == 0
    result = dict(Checkpoint.open(tmp_path / "fp8" / f"models_t5-fp8{ending}").stream())
    dtypes = {name: tensor.dtype for name, tensor in result.items()}
    assert dtypes == {
        **dict.fromkeys(tensors, torch.bfloat16),
        **dict.fromkeys(("blocks.0.attn.q.weight", "blocks.0.ffn.gate.0.weight"), torch.float8_e4m3fn),
        **dict.fromkeys(("blocks.0.attn.q.weight_scale", "blocks.0.ffn.gate.0.weight_scale"), torch.float32),
    }


def test_image_encoder_loses_its_text_half(tmp_path: Path) -> None:
    names = ("visual.transformer.0.attn.to_qkv.weight", "visual.transformer.0.mlp.0.weight", "textual.0.attn.q.weight")
    torch.save({name: torch.randn(12, 8).half() for name in names}, tmp_path / "models_clip.pth")
    assert run(tmp_path / "models_clip.pth", tmp_path / "out", "-t", "wan_clip", *INT8, "--save_by_block") == 0
    result = load_file(tmp_path / "out" / "block_0.safetensors")
    assert {name for name, tensor in result.items() if tensor.dtype == torch.int8} == set(names[:2])
    assert run(tmp_path / "models_clip.pth", tmp_path / "no", "-t", "wan_clip", "-d", "forward") == 2


def test_an_interrupted_run_is_taken_up_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    opened: list[str] = []
    original = open_output

    def failing(path: Path, *rest: object) -> object:
        opened.append(path.name)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return original(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("lightx2v.convert.run.open_output", failing)
    assert run(source, out, *INT8, "--save_by_block") == 130
    assert not [path for path in out.iterdir() if not path.name.startswith(".")]  # nothing that looks whole
    assert run(source, out, *INT8, "--save_by_block") == 0
    assert opened == ["block_0.safetensors", "block_1.safetensors", "non_block.safetensors", "non_block.safetensors"]
    assert run(source, out, *INT8, "--save_by_block") == 0 and len(opened) == 4  # all is there already
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr("lightx2v.convert.run.open_output", original)
    run(source, whole, *INT8, "--save_by_block")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


@pytest.mark.parametrize("change", ["options", "source", "damage"])
def test_finished_files_of_another_conversion_are_redone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    out = tmp_path / "out"
    run(source, out, *INT8, "-b", "--json")
    flags = INT8
    if change == "options":
        flags = ("--quantized", "--linear_type", "fp8")
    elif change == "source":  # same names, shapes and sizes
        write_wan(source, {name: tensor * 2 for name, tensor in wan().items()})
    else:
        (out / "block_0.safetensors").write_bytes((out / "block_0.safetensors").read_bytes()[:-1])
    capsys.readouterr()
    assert run(source, out, *flags, "-b", "--json", "--verify") == 0
    assert json.loads(capsys.readouterr().out)["files_kept"] == (2 if change == "damage" else 0)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--quantised",), 2, "did you mean '--quantized'?"),
        (("-t", "wan_dti"), 2, "did you mean 'wan_dit'?"),
        (("--quantized", "--linear_type", "fp8-b12"), 2, "did you mean 'fp8-b128'?"),
        (("--quantized",), 2, "add --linear_type int8|fp8|fp8-b128"),
        (("--linear_type", "int8"), 2, "only with --quantized"),
        ((*INT8, "--linear_dtype", "torch.float8_e4m3fn"), 2, "contradicts --linear_dtype"),
        ((*INT8, "--bits", "4"), 2, "allowed: 8"),
        (("-c", "0"), 2, "1 or more"),
        (("-c", "-3"), 2, "1 or more"),
        (("-b", "--single_file"), 2, "contradicts --single_file"),
        (("-b", "-o_e", ".pth"), 2, ".safetensors only"),
        ((*INT8, "--target-keys", "self_atn"), 2, "did you mean 'self_attn'?"),
        ((*INT8, "--ignore-quant-keys", "cros_attn"), 2, "did you mean 'cross_attn'?"),
        (("--ignore-keys", "hed"), 2, "did you mean 'head'?"),
        ((*INT8, "--ignore-quant-keys", "blocks"), 2, "leaves no layer to quantize"),
        ((*INT8, "-t", "wan_t5"), 2, "use --model_type wan_dit"),
        (("--lora_strength", "1"), 2, "1 values for 0 LoRAs"),
        (("--device", "abacus"), 2, "there is no 'abacus' here"),
        (("-o_n", "a/b"), 2, "not a plain file name"),
    ],
)
def test_mistakes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], code: int, says: str
) -> None:
    try:
        result = run(source, tmp_path / "out", *flags)
    except SystemExit as exit_:  # argparse
        result = int(exit_.code or 0)
    assert result == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_written_to(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert run(source, source / "..") == 0 or run(source, source) == 2
    assert run(source / "diffusion_pytorch_model-00001-of-00002.safetensors", source) == 2
    assert "where the source is" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.1.ffn.2.weight", "blocks.0.norm3.weight"])
def test_values_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: float
) -> None:
    tensors = wan()
    tensors[name].view(-1)[-1] = value
    source = write_wan(tmp_path / "model", tensors)
    for scheme in LINEAR_TYPES:
        assert run(source, tmp_path / "out", "--quantized", "--linear_type", scheme) == 2
        assert f"tensor '{name}' has NaN or infinite values" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))[1:]  # the folder of unfinished files alone


def test_values_that_the_dtype_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = wan()
    tensors["head.modulation"][0, 0, 0] = 2**20
    source = write_wan(tmp_path / "model", tensors)
    assert run(source, tmp_path / "out", *INT8, "--non_linear_dtype", "torch.float16") == 2
    assert "'head.modulation' has a value of 1.05e+06, which F16 cannot hold" in capsys.readouterr().err


def test_a_quantized_source_is_refused_but_can_be_split_anew(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "int8", *INT8, "--single_file")
    single = tmp_path / "int8" / "converted.safetensors"
    assert run(single, tmp_path / "again", *INT8) == 2
    assert run(single, tmp_path / "split", "-b", "--non_linear_dtype", "torch.bfloat16") == 0
    before, after = load_file(single), read(tmp_path / "split")
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)
    assert {after[name].dtype for name in after if name.endswith("_scale")} == {torch.float32}


def test_layer_rules_can_be_changed(source: Path, tmp_path: Path) -> None:
    flags = ("--target-keys", "ffn", "cross_attn", "--ignore-quant-keys", "blocks.0.ffn", "--ignore-keys", "head")
    run(source, tmp_path / "out", *INT8, *flags)
    result = read(tmp_path / "out")
    quantized = {name.removesuffix(".weight") for name, tensor in result.items() if tensor.dtype == torch.int8}
    assert quantized == {
        f"blocks.{index}.{layer}"
        for index, layer in ((index, layer) for index in (0, 1) for layer in LAYERS)
        if layer.startswith("cross_attn") or (index, layer[:3]) == (1, "ffn")
    }
    assert not any("head" in name for name in result)


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.02), ("fp8", 0.05), ("fp8-b128", 0.05)])
def test_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, most: float) -> None:
    out, flags = tmp_path / "out", ("--quantized", "--linear_type", scheme, "--verify", "--json", "-b")
    assert run(source, out, *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] is True and len(report["worst"]) == 10
    assert most / 20 < report["worst"][0]["error"] < most
    file = out / "block_1.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-500:-300] = bytes(200)  # codes of the last tensor
    file.write_bytes(damaged)
    assert run(source, out, *flags) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["verified"] is False and "blocks.1.self_attn.v.weight" in printed.err


def test_verify_finds_a_changed_tensor_that_is_not_quantized(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, "--single_file")
    damaged = bytearray((out / "converted.safetensors").read_bytes())
    damaged[-1] ^= 1
    (out / "converted.safetensors").write_bytes(damaged)
    assert run(source, out, "--single_file", "--verify") == 1


def test_summary(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", *INT8, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    tensors = wan().values()
    assert report["bytes_in"] == sum(tensor.nbytes for tensor in tensors)
    assert report["bytes_out"] == sum(tensor.nbytes for tensor in read(tmp_path / "out").values())
    assert (report["layers_quantized"], report["tensors_kept"]) == (20, len(tensors) - 20)
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 2**20
    assert run(source, tmp_path / "out", *INT8) == 0
    assert "quantized 20 layers" in capsys.readouterr().out


def test_one_thread_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for flag in ("--parallel", "--no-parallel"):
        run(source, tmp_path / flag, *INT8, flag)
    parallel, serial = tmp_path / "--parallel", tmp_path / "--no-parallel"
    assert all(path.read_bytes() == (serial / path.name).read_bytes() for path in parallel.iterdir())


def test_other_files_are_copied_when_asked(source: Path, tmp_path: Path) -> None:
    (source / "google").mkdir()
    (source / "google" / "tokenizer.json").write_text("{}")
    (source / ".cache").mkdir()
    (source / ".cache" / "note").write_text("x")
    assert run(source, source / "int8", *INT8, "--copy_no_weight_files") == 0  # inside the source, as is usual
    copied = {str(path.relative_to(source / "int8")) for path in (source / "int8").rglob("*.json")}
    assert copied == {"google/tokenizer.json", "config.json", INDEX}
    assert not (source / "int8" / ".cache").exists()


def test_a_model_directory_of_diffusers(tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    write_wan(root / "transformer", wan(), "diffusers")
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 40, "in_channels": 16}
    (root / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "WanTransformer3DModel"}))
    (root / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    assert run(root, tmp_path / "out", *INT8, "-b") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dim"] == 24


def test_a_full_disk_is_known_beforehand(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert run(source, tmp_path / "out", *INT8) == 1
    assert "10 are free" in capsys.readouterr().err


def test_debug_shows_the_traceback(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        run(tmp_path / "absent", tmp_path / "out", "--debug")


MEASURE = """
import sys
from lightx2v.convert.cli import main
from lightx2v.platform import peak_memory, reset_peak_memory, select_device
import lightx2v.convert.run
cpu = select_device("cpu")
assert main(["-s", sys.argv[1], "-o", sys.argv[2], *sys.argv[4:]]) == 0  # loads all that is loaded lazily
reset_peak_memory(cpu)
before = peak_memory(cpu)
assert main(["-s", sys.argv[3], "-o", sys.argv[2] + "-big", *sys.argv[4:]]) == 0
print(peak_memory(cpu) - before)
"""


@pytest.mark.parametrize(("ending", "scheme"), [(".safetensors", "int8"), (".pth", "int8"), (".safetensors", "nvfp4")])
def test_memory_does_not_grow_with_the_checkpoint(source: Path, tmp_path: Path, ending: str, scheme: str) -> None:
    tensors = {f"blocks.{index}.ffn.0.weight": torch.ones(2048, 2048, dtype=torch.bfloat16) for index in range(24)}
    big = tmp_path / f"big{ending}"
    save_file(tensors, big) if ending == ".safetensors" else torch.save(tensors, big)
    largest, total = 2048 * 2048 * 2, sum(tensor.nbytes for tensor in tensors.values())
    script = [
        sys.executable,
        "-c",
        MEASURE,
        str(source),
        str(tmp_path / "out"),
        str(big),
        "--quantized",
        "--linear_type",
        scheme,
        "--target-keys",
        "ffn",
    ]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    growth = int(done.stdout.splitlines()[-1])
    assert growth < 2 * largest + 64 * 2**20, f"{growth:,} bytes for a checkpoint of {total:,}"


@pytest.mark.parametrize("folder", ["tools", "/"])
def test_the_script_runs_from_any_folder_without_torch(folder: str) -> None:
    root = Path(__file__).parents[2]
    script = root / "tools" / "convert" / "converter.py"
    watch = "import runpy, sys; sys.argv = ['converter.py', '--help']\ntry: runpy.run_path(%r, run_name='__main__')\n"
    watch += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", watch % str(script)], cwd=root / folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--save_by_block" in done.stdout, done.stderr


def test_main_is_the_entry_point(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--source", str(source)])
    assert caught.value.code == 2
