"""What a peer shows to the benchmarks: how it quantizes the linears of a model that is there in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightx2v.errors import ConfigError, LightX2VError, suggestion
from lightx2v.platform import install_hint, probe
from lightx2v.registry import Registry

Quantize = Callable[[nn.Module, Sequence[str]], None]
"""Exchange, in place, the bfloat16 nn.Linear of each name in the model, or its weight, for the library's own."""

COMPILED = "-compile"
"""End of the name of a peer whose blocks torch.compile has compiled."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One library in one setting."""

    name: str
    words: str
    """What it computes."""
    modules: tuple[str, ...]
    """What must be installed."""
    quantize: Quantize
    whole_model: bool = False
    """Whether it has only models, and no linear layer of its own."""


PEERS: Registry[Peer] = Registry("--peers")
PEERS.add("diffusers", "lightx2v.bench.peers.diffusers:PEER")
PEERS.add("torchao-int8", "lightx2v.bench.peers.torchao:INT8")
PEERS.add("torchao-int8-weights", "lightx2v.bench.peers.torchao:INT8_WEIGHTS")
PEERS.add("torchao-fp8", "lightx2v.bench.peers.torchao:FP8")
PEERS.add("quanto-int8", "lightx2v.bench.peers.quanto:INT8")
PEERS.add("quanto-fp8", "lightx2v.bench.peers.quanto:FP8")
PEERS.add("bitsandbytes-int8", "lightx2v.bench.peers.bitsandbytes:INT8")
PEERS.add("sdnq-int8", "lightx2v.bench.peers.sdnq:INT8")


@dataclass(frozen=True, slots=True)
class Choice:
    """A peer, with or without torch.compile."""

    peer: Peer
    compiled: bool

    @property
    def name(self) -> str:
        return self.peer.name + (COMPILED if self.compiled else "")

    def obstacle(self, bench: str) -> str | None:
        """Why the peer cannot take part in `bench`; None when it can."""
        if self.peer.whole_model and bench == "linear":
            return "has no linear layer of its own: it runs torch's"
        for module in self.peer.modules:
            if (reason := probe(module).reason) is not None:
                return f"{module} is {reason} ({install_hint(module)})"
        return None

    def check(self, bench: str) -> None:
        """Raise LightX2VError with the obstacle, if there is one."""
        if reason := self.obstacle(bench):
            raise LightX2VError("", reason)

    def quantize(self, model: nn.Module, names: Sequence[str]) -> None:
        """Have the peer quantize the linears `names`. LightX2VError when it leaves one as it was.

        Some libraries pass over layers that they find too small; such a row would show torch under their name.
        """
        self.peer.quantize(model, names)
        left = [name for name in names if _is_plain(model.get_submodule(name))]
        if left and not self.peer.whole_model:
            raise LightX2VError("", f"leaves {len(left)} of {len(names)} layers unquantized, such as '{left[0]}'")


def _is_plain(layer: nn.Module) -> bool:
    """Whether `layer` is torch's own, with a weight that is a floating-point tensor of torch's own."""
    if type(layer) is not nn.Linear:
        return False
    return type(layer.weight) is nn.Parameter and type(layer.weight.data) is Tensor and layer.weight.is_floating_point()


def choose(text: str | None, bench: str) -> list[Choice]:
    """The peers named in a list with commas; "all" is every one that can take part in `bench`, compiled and not.

    Raises ConfigError with the closest name for one that does not exist.
    """
    known = [name + end for name in PEERS for end in ("", COMPILED)]
    chosen: dict[str, Choice] = {}
    for word in text.split(",") if text else ():
        names = known if word == "all" else [word]
        for name in names:
            if name not in known:
                raise ConfigError(
                    "--peers", f"unknown peer '{name}'{suggestion(name, known)}", allowed=", ".join(["all", *known])
                )
            choice = Choice(PEERS[name.removesuffix(COMPILED)], name.endswith(COMPILED))
            if word != "all" or choice.obstacle(bench) is None:
                chosen[name] = choice
    return list(chosen.values())
