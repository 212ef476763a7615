"""bitsandbytes' LLM.int8() layer without its search for outliers, which is the faster setting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightx2v.bench.peers.base import Peer


def _quantize(model: nn.Module, names: Sequence[str]) -> None:
    import bitsandbytes

    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = bitsandbytes.nn.Linear8bitLt(
            old.in_features,
            old.out_features,
            old.bias is not None,
            has_fp16_weights=False,
            threshold=0.0,
            device="meta",
        )
        # What quantizes the weight is its way from the CPU to its device, the CPU itself included.
        new.weight = bitsandbytes.nn.Int8Params(old.weight.data.cpu(), has_fp16_weights=False, requires_grad=False)
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to(old.weight.device))


INT8 = Peer("bitsandbytes-int8", "int8 weights per channel, int8 activations per token", ("bitsandbytes",), _quantize)
