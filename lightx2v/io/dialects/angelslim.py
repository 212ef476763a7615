"""AngelSlim's export (https://github.com/Tencent/AngelSlim, 0.5): fp8 weights, and their scales in a second file.

    diffusion_pytorch_model.safetensors or model.safetensors    <layer>.weight e4m3 [N, K], <layer>.weight_scale float32
    fp8_scales.safetensors                                      <layer>.weight_scale once more

AngelSlim itself writes one scale for a weight, whose inputs are quantized under one scale as they come. Where another
scheme was exported from here, the metadata of the second file says so.
"""

from __future__ import annotations

from dataclasses import replace

from lightx2v.io.declared import declared_layers
from lightx2v.io.dialects.base import Found, Translation
from lightx2v.io.weights import Checkpoint

SCALES = "fp8_scales.safetensors"
_SCALE = ".weight_scale"
_MM_TYPE = "W-fp8-tensor-sym-A-fp8-tensor-sym-dynamic-Auto-ActAngelSlim"
"""With its arithmetic for the scale of inputs: that of their dtype, bfloat16 too."""


class AngelSlim:
    """The dialect."""

    def detect(self, found: Found) -> bool:
        return (found.folder / SCALES).is_file() and any(name.endswith(_SCALE) for name in found.tensors)

    def translate(self, found: Found) -> Translation:
        """The model's file as it is, with the mm_type of each layer said."""
        second = Checkpoint.open(found.folder / SCALES)
        said = declared_layers(second.metadata)
        alone = {name: info for name, info in second.tensors.items() if name not in found.tensors}
        base = found.checkpoint
        if alone:
            files, tensors = (*base.files, *second.files), {**base.tensors, **alone}
            found = replace(found, checkpoint=replace(base, files=files, tensors=tensors))
        translation = Translation(found)
        for layer in found.ending(_SCALE):
            weight = found.tensors.get(f"{layer}.weight")
            if weight is None or weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
                problem = "has no weight" if weight is None else f"has a weight of {weight.dtype} {list(weight.shape)}"
                raise found.refuse(f"'{layer}' has a scale and {problem}", "float8_e4m3fn [N, K]")
            n, k = weight.shape
            scale = found.tensors[layer + _SCALE]
            if layer not in said and scale.shape not in ((), (1,)):
                raise found.refuse(f"'{layer}{_SCALE}' has shape {list(scale.shape)}", "one scale, as AngelSlim writes")
            leaves = {"weight": translation.same(weight.name), "weight_scale": translation.same(scale.name)}
            translation.layer(layer, said.get(layer, _MM_TYPE), leaves, n, k)
        return translation


DIALECT = AngelSlim()
