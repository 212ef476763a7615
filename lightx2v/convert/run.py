"""Runs a plan: slab by slab, on every core or on an accelerator, one file after the other."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from loguru import logger
from tqdm import tqdm

from lightx2v.convert.configs import INDEX, copy_other_files, write_index, write_json
from lightx2v.convert.options import Options
from lightx2v.convert.planning import Plan, Shard, make_plan
from lightx2v.convert.slabs import Converter, Job, Runner
from lightx2v.convert.verify import LayerError, verify
from lightx2v.convert.writer import OutputFile, open_output
from lightx2v.errors import CheckpointError, ResourceError
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.io.headers import read_header
from lightx2v.platform import DeviceInfo, peak_memory, select_device

MAX_WORKERS = {"cpu": 16, "accelerator": 4}
"""Threads: what it takes to fill the memory bus, or to keep an accelerator busy. Each has a slab in memory."""
T = TypeVar("T")


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


def convert(options: Options) -> Report:
    """Plan and run.

    Raises LightX2VError. Files that were finished until then serve the next run with the same source and options.
    """
    begin = time.perf_counter()
    device = select_device(options.device)
    plan = make_plan(options)
    staging = options.output / f".incomplete-{options.output_name}"
    todo = _unfinished(plan, staging)
    _check_space(options.output, todo)
    converter = Converter(plan, device)
    total = sum(slot.nbytes for shard in todo for slot in shard.slots)
    errors: list[LayerError] = []
    with _pool(options, device) as run:
        with _bar("converting", total) as bar:
            for shard in todo:
                with open_output(staging / shard.file, shard.slots, shard.metadata) as file:
                    for done in run(_writing(converter, file), converter.jobs(shard.items)):
                        bar.update(done)
                    for slot in shard.zeros:
                        file.write(slot.name, torch.zeros(slot.shape).to(TORCH_DTYPES[slot.dtype]))
        _publish(plan, staging)
        if options.verify:
            with _bar("verifying", sum(slot.nbytes for shard in plan.shards for slot in shard.slots)) as bar:
                errors = verify(plan, converter, run, bar.update)
    return _report(plan, begin, len(todo), errors)


def _report(plan: Plan, begin: float, converted: int, errors: list[LayerError]) -> Report:
    return Report(
        output=str(plan.result),
        seconds=round(time.perf_counter() - begin, 3),
        peak_memory_bytes=peak_memory(select_device("cpu")),
        bytes_in=sum(item.source.nbytes for item in plan.items),
        bytes_out=sum(slot.nbytes for shard in plan.shards for slot in shard.slots),
        files=len(plan.shards),
        files_kept=len(plan.shards) - converted,
        layers_quantized=sum(item.spec is not None for item in plan.items),
        tensors_kept=sum(item.spec is None for item in plan.items),
        tensors_dropped=len(plan.dropped),
        loras=len(plan.options.loras),
        worst=tuple(errors[:10]),
        verified=all(error.good for error in errors) if plan.options.verify else None,
    )


def _writing(converter: Converter, file: OutputFile) -> Callable[[Job], int]:
    """A function that converts and writes one job and returns the bytes written."""

    def write(job: Job) -> int:
        slots = {"weight": job.item.weight, **job.item.scales}
        leaves = converter.convert(job)
        for leaf, (rows, first) in leaves.items():
            file.write(slots[leaf].name, rows, first)
        return sum(rows.nbytes for rows, _ in leaves.values())

    return write


@contextmanager
def _pool(options: Options, device: DeviceInfo) -> Iterator[Runner]:
    """What runs jobs in threads of one core each, so that reading, computing and writing overlap."""
    most = MAX_WORKERS["cpu" if device.kind == "cpu" else "accelerator"]
    workers = min(most, os.cpu_count() or 1) if options.parallel else 1
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers)

    def run(job: Callable[[Job], T], jobs: Iterable[Job]) -> Iterator[T]:
        futures = [pool.submit(job, one) for one in jobs]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    try:
        yield run
    finally:
        pool.shutdown()
        torch.set_num_threads(before)


def _bar(what: str, total: int) -> tqdm[None]:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, mininterval=0.5)


def _unfinished(plan: Plan, staging: Path) -> list[Shard]:
    """The files that an earlier run did not finish; what it left of another conversion is removed."""
    todo = []
    for shard in plan.shards:
        if _is_done(staging, shard):
            continue
        (staging / shard.file).unlink(missing_ok=True)
        if not _is_done(plan.options.output, shard):
            todo.append(shard)
    return todo


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
    """Move the finished files to their place, and write what describes them, the index last."""
    output = plan.options.output
    index = output / INDEX
    if plan.indexed:
        index.unlink(missing_ok=True)
    for shard in plan.shards:
        if (staging / shard.file).exists():
            os.replace(staging / shard.file, output / shard.file)
    shutil.rmtree(staging, ignore_errors=True)
    if plan.config is not None:
        write_json(output / "config.json", plan.config)
    elif plan.options.model_type == "wan_dit":
        logger.warning("{} has no config.json beside the weights, so none is written", plan.options.source)
    if plan.options.copy_no_weight_files:
        copy_other_files(plan.checkpoint.files[0].parent, output)
    if plan.indexed:
        _index(plan)


def _index(plan: Plan) -> None:
    output = plan.options.output
    files = {shard.file for shard in plan.shards}
    others = sorted(path.name for path in output.glob("*.safetensors") if path.name not in files)
    if others:
        logger.warning("{} also holds {}, which the index does not name", output, ", ".join(others[:5]))
    weight_map = {slot.name: shard.file for shard in plan.shards for slot in shard.slots}
    total = sum(slot.nbytes for shard in plan.shards for slot in shard.slots)
    write_index(output, weight_map, total)
