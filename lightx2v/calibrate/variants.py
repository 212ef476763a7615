"""Every layer as each candidate makes it: solved once, kept on disk, and put together into checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightx2v.calibrate.output import Output
from lightx2v.calibrate.part import PartResult, PartSolver, look
from lightx2v.calibrate.rules import layer_bytes
from lightx2v.calibrate.solve import Solved
from lightx2v.calibrate.steps import StepGroups
from lightx2v.calibrate.walk import BlockWalk, Part
from lightx2v.calibrate.watch import shared_inputs
from lightx2v.config.calibration import CalibrationConfig
from lightx2v.io.weights import Checkpoint, write_safetensors
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo
from lightx2v.quant.around import AROUND_LEAVES, around_bytes


class Variants:
    """The layers of `walk`, made by `recipe` in each of `schemes` by mm_type; their tensors are files of `folder`.

    Multipliers stay beside their layers: in a norm, one would bind all that read it to the same candidate.
    """

    def __init__(
        self,
        folder: Path,
        walk: BlockWalk,
        schemes: Mapping[str, Scheme],
        recipe: CalibrationConfig,
        device: DeviceInfo,
    ) -> None:
        self.walk, self.schemes, self.device = walk, schemes, device
        self._recipe, self._folder = recipe.model_copy(update={"fold": False}), folder
        self._steps = StepGroups.of(recipe, walk.plan.request.steps)
        self._part_of: dict[str, str] = {}
        self._told: dict[tuple[str, str], Mapping[str, float | int | str]] = {}
        self._around: dict[tuple[str, str], int] = {}
        self._edited: dict[str, Mapping[str, Tensor]] = {}
        """By part, scales of its attentions."""

    def solve(self, part: Part) -> None:
        """Make and keep the layers of a part, whose inputs are looked at once."""
        names = [name for name in self.walk.layers if name.startswith(part.prefix)]
        self._part_of |= dict.fromkeys(names, part.name)
        groups = shared_inputs(part.module, [name.removeprefix(part.prefix) for name in names])
        seen, recipe = look(part, groups, self.schemes.values(), self._recipe, self._steps), self._recipe
        self._folder.mkdir(parents=True, exist_ok=True)
        for mm_type, scheme in self.schemes.items():
            solver = PartSolver(part, dict.fromkeys(names, scheme), recipe, self._steps, self.device, seen)
            result = solver.solve()
            tensors = {f"{name}.{leaf}": t for name, one in result.solved.items() for leaf, t in one.leaves.items()}
            write_safetensors(self._file(part.name, mm_type), tensors, {})
            for name, one in result.solved.items():
                self._told[name, mm_type] = one.told
                shapes = {leaf: tuple(t.shape) for leaf, t in one.leaves.items() if leaf in AROUND_LEAVES}
                self._around[name, mm_type] = around_bytes(shapes)
            # The attention is that of the float part, whatever the candidate: once will do.
            self._edited.setdefault(part.name, result.edited)
            recipe = recipe.model_copy(update={"attention": False})

    def error(self, layer: str, mm_type: str) -> float:
        """|y_q - y| / |y| of a layer's results on inputs that were seen."""
        return float(self._told[layer, mm_type]["error"])

    def nbytes(self, layer: str, mm_type: str) -> float:
        """Of a layer's weight, with scales, multiplier and branch; "Default" has 16 bits."""
        return layer_bytes(self.schemes.get(mm_type), *self.walk.layers[layer]) + self._around.get((layer, mm_type), 0)

    def leaves(self, layer: str, mm_type: str) -> dict[str, Tensor]:
        """The tensors of a layer by their last names, without its bias."""
        stored = Checkpoint.open(self._file(self._part_of[layer], mm_type))
        names = [name for name in stored.tensors if name.startswith(f"{layer}.")]
        return {name.removeprefix(f"{layer}."): tensor.clone() for name, tensor in stored.stream(names)}

    def assemble(self, types: Mapping[str, str], output: Output) -> None:
        """Write the files of a checkpoint whose layers have these mm_types."""
        output.begin()
        for part, prefix in zip(self.walk.names, self.walk.prefixes, strict=True):
            here = {name: types[name] for name in types if name.startswith(prefix) and types[name] in self.schemes}
            solved = {name: Solved(self.leaves(name, each), self._told[name, each]) for name, each in here.items()}
            schemes = {name: self.schemes[each] for name, each in here.items()}
            output.write(part, prefix, self.walk.source, PartResult(solved, self._edited[part]), schemes)
        output.write_rest(self.walk.prefixes, self.walk.source)

    def _file(self, part: str, mm_type: str) -> Path:
        return self._folder / f"{part}.{list(self.schemes).index(mm_type)}.safetensors"
