"""The blocks of a transformer of diffusers as the stack that our caches work on.

Where the forward of a model does nothing between its blocks, the whole list can be exchanged for one module that runs
them all, and that module runs what a cache makes of the stack. Which of a block's arguments and results are the tokens
is what diffusers has registered for its own hooks. That nothing lies between the blocks is tried out once, on the first
forward: it must come to the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightx2v.errors import ConfigError, LightX2VError
from lightx2v.features.base import RunInfo
from lightx2v.features.cache import Cache as FeatureCache
from lightx2v.features.cache import CacheReport
from lightx2v.foreign.forward import BRANCHES, Forward, Steps, twin, wrapped_forward
from lightx2v.models.base import Prepared, StepContext, Stream, TimeEmbedding, run_blocks

_LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers")
"""What diffusers' transformers call their main lists of blocks, in the order in which they run."""
_PARTS = {"attn1": "self", "attn": "self", "attention": "self", "attn2": "cross"} | dict.fromkeys(
    ("ff", "ffn", "feed_forward", "ff_context"), "mlp"
)
"""Submodules of blocks whose output is added to the tokens, and what our caches call that part."""
_TOLERANCE = 1e-2
"""Relative difference that rounding may make between two runs of the same blocks."""


class _Form(NamedTuple):
    """Where the tokens are in a block's arguments and results; a place of None: there are no text tokens in them."""

    x: str
    txt: str | None
    x_place: int
    txt_place: int | None
    parameters: tuple[str, ...]


def stack_lists(model: Any) -> dict[str, tuple[nn.Module, ...]]:
    """The lists of blocks of a transformer, by name. Raises ConfigError for a model whose blocks are not known."""
    there = {name: getattr(model, name, None) for name in _LISTS}
    lists = {name: tuple(blocks) for name, blocks in there.items() if isinstance(blocks, nn.ModuleList)}
    unknown = [type(block).__name__ for blocks in lists.values() for block in blocks if _form(block) is None]
    if unknown or not lists:
        what = f"blocks {unknown[0]}" if unknown else "blocks"
        raise ConfigError(
            "cache.type",
            f"is set, and diffusers does not say what the {what} of '{type(model).__name__}' take and give",
            allowed="none, and on a UNet deepcache",
        )
    return lists


def _form(block: nn.Module) -> _Form | None:
    from diffusers.hooks import _helpers

    try:
        known = _helpers.TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None
    parameters = tuple(inspect.signature(type(block).forward).parameters)[1:]
    x, txt = known.hidden_states_argument_name, known.encoder_hidden_states_argument_name
    places = known.return_hidden_states_index, known.return_encoder_hidden_states_index
    carried = txt if places[1] is not None and txt in parameters else None
    return _Form(x if x in parameters else parameters[0], carried, *places, parameters)


class StackCache:
    """A cache of ours on the blocks of one transformer of diffusers."""

    def __init__(self, feature: FeatureCache) -> None:
        self.feature = feature
        self._tried = False

    @property
    def report(self) -> CacheReport:
        """Of the latest request."""
        return self.feature.report

    @contextmanager
    def attached(self, model: nn.Module, steps: Steps) -> Iterator[None]:
        """`model` runs with the cache inside the block, which is one request."""
        stack = BlockStack(model)
        collapsed = twin(model)
        for name, gate in stack.gates.items():
            setattr(collapsed, name, nn.ModuleList([gate]))
        state: dict[str, Any] = {}

        def wrap(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                if not self._tried:
                    self._try(stack, collapsed, forward, args, kwargs)
                if not state:
                    state["stack"] = self.feature.begin(_run_info(steps, stack), run_blocks)
                stack.run, stack.step, stack.branch = state["stack"], steps.step, steps.branch(model)
                return collapsed(*args, **kwargs)

            return run

        with wrapped_forward(model, wrap):
            yield

    def _try(self, stack: BlockStack, collapsed: Any, forward: Forward, args: Any, kwargs: Any) -> None:
        """Refuse a model that does more than run its blocks one after the other."""
        stack.run = run_blocks
        got, wanted = _first_tensor(collapsed(*args, **kwargs)), _first_tensor(forward(*args, **kwargs))
        same = got.shape == wanted.shape
        off = float((got - wanted).norm() / wanted.norm().clamp(min=1e-6)) if same else float("inf")
        if not off <= _TOLERANCE:
            name = type(collapsed).__name__
            raise LightX2VError("cache", f"'{name}' does more than run its blocks in turn", do="set cache.type to none")
        self._tried = True


class BlockStack:
    """The blocks as `models.base.DiT` shows its own, to one request."""

    time_signal = False

    def __init__(self, model: Any) -> None:
        lists = stack_lists(model)
        self.blocks: list[_Block] = []
        self.gates: dict[str, _Gate] = {}
        for name, blocks in lists.items():
            self.gates[name] = _Gate(self, _form(blocks[0]), last=name == list(lists)[-1])
            self.blocks += [
                _block(block, self.gates[name], len(self.blocks) + index) for index, block in enumerate(blocks)
            ]
        self.run: Any = run_blocks
        self.step, self.branch = 0, BRANCHES[0]
        self.held: Stream | None = None
        """What came into the first of several lists: the blocks of all run when the last is reached."""

    def attention_parts(self) -> list[Any]:
        return []

    def signal(self, stream: Stream, context: StepContext) -> Tensor:
        raise LightX2VError("cache", "a model of diffusers has no signal for this method", do="name another cache.type")

    def compute(self, stream: Stream) -> Stream:
        nothing = stream.x.new_zeros(0)
        context = StepContext(
            TimeEmbedding(nothing, nothing), (nothing, nothing), Prepared(nothing), (1, 1, stream.x.shape[1]),
            self.step, self.branch,
        )  # fmt: skip
        result: Stream = self.run(self, stream, context)
        return result


class _Gate(nn.Module):
    """Stands for one list of blocks in the forward of its model."""

    def __init__(self, stack: BlockStack, form: Any, last: bool) -> None:
        super().__init__()
        self.form: _Form = form
        self.arguments: Mapping[str, Any] = {}
        """Of this forward, by name, but for the tokens: the same for every block."""
        self._stack, self._last = stack, last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        form, stack = self.form, self._stack
        self.arguments = dict(zip(form.parameters, args, strict=False)) | kwargs
        stream = Stream(self.arguments[form.x], self.arguments[form.txt] if form.txt else None)
        if stack.held is not None and (stack.held.x is not stream.x or stack.held.txt is not stream.txt):
            raise LightX2VError("cache", "the tokens change between two lists of blocks", do="set cache.type to none")
        stack.held = None if self._last else stream
        out = stack.compute(stream) if self._last else stream
        if form.txt_place is None:
            return out.x
        return (out.x, out.txt) if form.x_place == 0 else (out.txt, out.x)


class _Block:
    """One block, as ours are called. Its submodules are the block's own."""

    recallable: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, block: nn.Module, gate: _Gate, index: int) -> None:
        self.__dict__.update(block=block, gate=gate, index=index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["block"], name, value)

    def __call__(self, stream: Stream, context: StepContext) -> Stream:
        form: _Form = self.gate.form
        tokens = {form.x: stream.x} | ({form.txt: stream.txt} if form.txt else {})
        out = self.block(**{**self.gate.arguments, **tokens})
        if not isinstance(out, tuple):
            return Stream(out, stream.txt)
        txt = stream.txt if form.txt_place is None else out[form.txt_place]
        return Stream(out[form.x_place], stream.txt if txt is None else txt)  # SD3's last block gives no text


def _block(block: nn.Module, gate: _Gate, index: int) -> _Block:
    kinds: dict[str, tuple[str, ...]] = {}
    for name, kind in _PARTS.items():
        if isinstance(getattr(block, name, None), nn.Module):
            kinds[kind] = (*kinds.get(kind, ()), name)
    cls = type(f"_{type(block).__name__}", (_Block,), {"recallable": kinds})
    made: _Block = cls(block, gate, index)
    return made


def _run_info(steps: Steps, stack: BlockStack) -> RunInfo:
    none = torch.zeros(0)
    return RunInfo(steps.total, BRANCHES, steps.levels, TimeEmbedding(none, none), len(stack.blocks))


def _first_tensor(result: Any) -> Tensor:
    """The tensor in what a model gives: itself, or the first of a tuple, a list or an output class."""
    while not isinstance(result, Tensor):
        values: Sequence[Any] = list(result.values()) if isinstance(result, Mapping) else result
        result = values[0]
    return result.float()
