"""mm_types of layers as rules, and what weights of an mm_type take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lightx2v.config.schema import MMRule
from lightx2v.mm.scheme import Scheme
from lightx2v.quant.formats import scale_bytes
from lightx2v.quant.spec import QSpec


def bits_per_weight(spec: QSpec | None) -> float:
    """Of the codes alone; 16 for float weights."""
    return 16.0 if spec is None else spec.bits or 8.0


def layer_bytes(scheme: Scheme | None, n: int, k: int) -> float:
    """Bytes of a weight [n, k] with its scales; of one in 16 bits without a scheme."""
    if scheme is None or scheme.weight is None:
        return 2.0 * n * k
    return n * scheme.weight.filled(k) * bits_per_weight(scheme.weight) / 8 + scale_bytes(scheme.weight, n, k)


def as_rules(types: Mapping[str, str]) -> tuple[str, tuple[MMRule, ...]]:
    """The commonest mm_type, and rules for the others: one for all blocks where they agree, then layer by layer."""
    default = Counter(types.values()).most_common(1)[0][0]
    globs: dict[str, list[str]] = {}
    for name in types:
        globs.setdefault(_everywhere(name), []).append(name)
    rules: list[MMRule] = []
    for glob, names in globs.items():
        common = Counter(types[name] for name in names).most_common(1)[0][0]
        if common != default:
            rules.append(MMRule(match=glob, mm_type=common))
        rules += [MMRule(match=name, mm_type=types[name]) for name in names if types[name] != common]
    return default, tuple(rules)


def _everywhere(name: str) -> str:
    """A layer's name with a glob for the number of its block."""
    return ".".join("*" if part.isdigit() and number == 1 else part for number, part in enumerate(name.split(".")))
