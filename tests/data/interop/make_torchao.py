"""diffusers' TorchAoConfig with save_pretrained.

torchao multiplies float8 codes on GPUs alone, so float8 is here with float activations only.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import TorchAoConfig, WanTransformer3DModel
from torch import Tensor
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)
from torchao.utils import TorchAOBaseTensor

from tests.data.interop.tiny import fresh, saved, wan, write_example

KEEP = ["condition_embedder", "proj_out"]
CONFIGS = {
    "int8-weight-only": TorchAoConfig(Int8WeightOnlyConfig()),
    "int8-dynamic": TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=KEEP),
    "int8-dynamic-whole": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "float8-weight-only": TorchAoConfig(Float8WeightOnlyConfig()),
}


def weight_of(layer: Any) -> Tensor:
    return layer.weight.dequantize() if isinstance(layer.weight, TorchAOBaseTensor) else layer.weight.detach()


if __name__ == "__main__":
    for variant, config in CONFIGS.items():
        folder = fresh("torchao", variant)
        with saved(wan(width=32)) as source:
            model = WanTransformer3DModel.from_pretrained(source, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folder)
        write_example(folder, model, weight_of, ("torchao",))
