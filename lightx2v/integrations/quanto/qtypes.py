"""The types that optimum-quanto quantizes to, by its names."""

from __future__ import annotations

from dataclasses import dataclass

from lightx2v.errors import ConfigError, suggestion


@dataclass(frozen=True, slots=True)
class QType:
    """`name` as in a quantization map; `dtype` as in `quant.spec.QSpec`."""

    name: str
    dtype: str

    def __str__(self) -> str:
        return self.name


qint8, qint4, qint2 = QType("qint8", "int8"), QType("qint4", "int4"), QType("qint2", "int2")
qfloat8_e4m3fn = QType("qfloat8_e4m3fn", "fp8")
qfloat8 = qfloat8_e4m3fn

TYPES = {kind.name: kind for kind in (qfloat8_e4m3fn, qint8, qint4, qint2)} | {"qfloat8": qfloat8}
_SPELLED = {"float8": "qfloat8", "int8": "qint8", "int4": "qint4", "int2": "qint2"}
"""diffusers' names."""
OF_ACTIVATIONS = (qint8, qfloat8)


def type_of(kind: str | QType | None, where: str) -> QType | None:
    """The type of a name of quanto's or diffusers'; None and "none" are none. Raises ConfigError for others."""
    if kind is None or isinstance(kind, QType):
        return kind
    name = _SPELLED.get(kind, kind)
    if name == "none":
        return None
    if name not in TYPES:
        raise ConfigError(where, f"unknown type '{kind}'{suggestion(kind, TYPES)}", allowed=", ".join(TYPES))
    return TYPES[name]


def activation_type(kind: str | QType | None, where: str) -> QType | None:
    """As `type_of`, for what activations can be."""
    found = type_of(kind, where)
    if found not in (None, *OF_ACTIVATIONS):
        raise ConfigError(where, f"activations are not quantized to {found}", allowed="qint8, qfloat8")
    return found
