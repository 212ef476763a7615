"""Runs a plan: slab by slab, on every core or on an accelerator, one file after the other."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from lightx2v.convert.configs import copy_other_files, write_config
from lightx2v.convert.options import Options
from lightx2v.convert.planning import INDEX, Item, Plan, Shard, make_plan
from lightx2v.convert.source import RowReader
from lightx2v.convert.verify import LayerError, verify
from lightx2v.convert.writer import TORCH_DTYPES, OutputFile, open_output
from lightx2v.errors import CheckpointError, ResourceError
from lightx2v.io.files import whole_file
from lightx2v.io.headers import read_header
from lightx2v.platform import DeviceInfo, peak_memory, select_device
from lightx2v.quant.numerics import quantize_weight

SLAB_ELEMENTS = {"cpu": 1 << 21, "accelerator": 1 << 24}
"""Elements of a tensor that are converted at a time; small on a CPU, so that they stay in its caches."""
_ROWS = 128  # slabs begin at multiples of this, the height of a block of scales


@dataclass(frozen=True)
class Report:
    """What a conversion did. Bytes are those of the tensors; memory is the peak of the whole process."""

    output: str
    seconds: float
    peak_memory_bytes: int
    bytes_in: int
    bytes_out: int
    files: int
    files_kept: int
    """Files that an earlier run with the same source and options had finished."""
    layers_quantized: int
    tensors_kept: int
    """Tensors that were not quantized."""
    tensors_dropped: int
    loras: int
    worst: tuple[LayerError, ...] = ()
    """With --verify, the ten layers that lost most."""
    verified: bool | None = None

    @property
    def ratio(self) -> float:
        return self.bytes_out / self.bytes_in

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "ratio": round(self.ratio, 4)}, indent=2)


@dataclass(frozen=True)
class Job:
    """Rows [start, stop) of one tensor."""

    item: Item
    start: int
    stop: int


class Converter:
    """The arithmetic of a plan: source rows, plus LoRA, in float32, as codes and scales or in the dtype of the output."""

    def __init__(self, plan: Plan, device: DeviceInfo) -> None:
        self.reader, self.device = RowReader(plan.checkpoint), device
        self.slab = SLAB_ELEMENTS["cpu" if device.kind == "cpu" else "accelerator"]

    def jobs(self, items: Iterable[Item]) -> Iterator[Job]:
        """All rows of all tensors, in slabs."""
        for item in items:
            shape = item.source.shape
            rows = shape[0] if shape else 1
            width = max(1, item.source.nbytes // TORCH_DTYPES[item.source.dtype].itemsize // max(1, rows))
            step = max(1, self.slab // width // _ROWS) * _ROWS
            for start in range(0, rows, step):
                yield Job(item, start, min(rows, start + step))

    def values(self, job: Job) -> Tensor:
        """The rows as they are to be stored or quantized: float32 where something is added or quantized."""
        item = job.item
        rows = self.reader.rows(item.source.name, job.start, job.stop).to(self.device.torch_name)
        if item.spec or item.patches:
            rows = rows.to(torch.float32, copy=True) if item.patches else rows.float()
            for patch in item.patches:
                patch.add(rows, job.start, job.stop)
        return rows

    def convert(self, job: Job) -> tuple[Tensor, Tensor | None]:
        """(weight, scale). Raises CheckpointError, which names the tensor, for a value that is not finite."""
        item, values = job.item, self.values(job)
        if item.spec:
            codes, scale = quantize_weight(values, item.spec)
            _check_finite(item, scale, values)
            return codes.cpu(), scale.cpu()
        weight = values.to(TORCH_DTYPES[item.weight.dtype])
        if weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
            _check_finite(item, weight, values)
        return weight.cpu(), None


def _check_finite(item: Item, result: Tensor, values: Tensor) -> None:
    if bool(torch.isfinite(result).all()):
        return
    where, name = str(item.source.file), item.source.name
    if bool(torch.isfinite(values).all()):
        largest = float(values.abs().max())
        raise CheckpointError(
            where,
            f"tensor '{name}' has a value of {largest:.3g}, which {item.weight.dtype} cannot hold",
            do="use --non_linear_dtype torch.float32 or torch.bfloat16",
        )
    what = "after the LoRA " if item.patches else ""
    raise CheckpointError(where, f"tensor '{name}' has NaN or infinite values {what}".rstrip(), do="mend the checkpoint")


def convert(options: Options) -> Report:
    """Plan and run. Raises LightX2VError; what was finished until then is kept for the next run with the same options."""
    begin = time.perf_counter()
    device = select_device(options.device)
    plan = make_plan(options)
    staging = options.output / f".incomplete-{options.output_name}"
    todo = [shard for shard in plan.shards if not any(_is_done(folder, shard) for folder in (staging, options.output))]
    _check_space(options.output, todo)
    converter = Converter(plan, device)
    total = sum(slot.nbytes for shard in todo for slot in shard.slots)
    with _pool(options, device) as run, _bar("converting", total) as bar:
        for shard in todo:
            with open_output(staging / shard.file, shard.slots, shard.metadata) as file:
                run(_writing(converter, file, bar.update), converter.jobs(shard.items))
    _publish(plan, staging)
    write_config(plan)
    if options.copy_no_weight_files:
        copy_other_files(options.source, options.output)
    worst, good = _verify(plan, converter) if options.verify else ((), None)
    return Report(
        output=str(plan.result),
        seconds=round(time.perf_counter() - begin, 3),
        peak_memory_bytes=peak_memory(select_device("cpu")),
        bytes_in=sum(item.source.nbytes for item in plan.items),
        bytes_out=sum(slot.nbytes for shard in plan.shards for slot in shard.slots),
        files=len(plan.shards),
        files_kept=len(plan.shards) - len(todo),
        layers_quantized=sum(item.spec is not None for item in plan.items),
        tensors_kept=sum(item.spec is None for item in plan.items),
        tensors_dropped=len(plan.dropped),
        loras=len(options.loras),
        worst=worst,
        verified=good,
    )


def _writing(converter: Converter, file: OutputFile, report: Callable[[int], object]) -> Callable[[Job], None]:
    def write(job: Job) -> None:
        item = job.item
        weight, scale = converter.convert(job)
        file.write(item.weight.name, weight, job.start)
        done = weight.nbytes
        if item.scale and scale is not None:
            per_row = item.spec is not None and item.spec.granularity != "block"
            file.write(item.scale.name, scale, job.start if per_row else job.start // _ROWS)
            done += scale.nbytes
        report(done)

    return write


@contextmanager
def _pool(options: Options, device: DeviceInfo) -> Iterator[Callable[[Callable[[Job], None], Iterable[Job]], None]]:
    """A function that runs jobs in threads of one core each, which read, compute and write at the same time."""
    workers = (os.cpu_count() or 1) if options.parallel else 1
    if device.kind != "cpu":
        workers = min(workers, 4)  # enough to overlap reading, copying and computing
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers)

    def run(job: Callable[[Job], None], jobs: Iterable[Job]) -> None:
        for future in [pool.submit(job, one) for one in jobs]:
            future.result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _bar(what: str, total: int) -> tqdm[None]:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, mininterval=0.5)


def _is_done(folder: Path, shard: Shard) -> bool:
    """Whether a file of the same source and options is there, whole."""
    path = folder / shard.file
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        infos, metadata = read_header(path)
    except CheckpointError:
        return False
    there = {(info.name, info.dtype, info.shape) for info in infos}
    return metadata == shard.metadata and there == {(slot.name, slot.dtype, slot.shape) for slot in shard.slots}


def _check_space(output: Path, todo: Iterable[Shard]) -> None:
    needed = sum(slot.nbytes for shard in todo for slot in shard.slots)
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise CheckpointError(str(output), f"{existing} is a file", do="give a directory as --output")
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            str(output), f"{needed:,} bytes are needed, {free:,} are free", do="free some space or write elsewhere"
        )


def _publish(plan: Plan, staging: Path) -> None:
    """Move the finished files to their place, and write the index last."""
    output = plan.options.output
    index = output / INDEX
    if plan.indexed:
        index.unlink(missing_ok=True)
    for shard in plan.shards:
        if (staging / shard.file).exists():
            os.replace(staging / shard.file, output / shard.file)
    shutil.rmtree(staging, ignore_errors=True)
    if not plan.indexed:
        return
    files = {shard.file for shard in plan.shards}
    others = sorted(path.name for path in output.glob("*.safetensors") if path.name not in files)
    if others:
        logger.warning("{} also holds {}, which the index does not name", output, ", ".join(others[:5]))
    weight_map = {slot.name: shard.file for shard in plan.shards for slot in shard.slots}
    total = sum(slot.nbytes for shard in plan.shards for slot in shard.slots)
    with whole_file(index) as temporary:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _verify(plan: Plan, converter: Converter) -> tuple[tuple[LayerError, ...], bool]:
    errors = verify(plan, converter)
    return tuple(errors[:10]), all(error.good for error in errors)
