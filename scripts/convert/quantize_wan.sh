#!/bin/bash
# Quantize the DiT of a Wan2.1 model directory, and check the result.
# Usage: quantize_wan.sh MODEL_DIR [int8|fp8|fp8-b128]     writes MODEL_DIR/<scheme>/
set -euo pipefail
model=${1:?usage: quantize_wan.sh MODEL_DIR [int8|fp8|fp8-b128]}
scheme=${2:-int8}
python "$(dirname "$0")/../../tools/convert/converter.py" --source "$model" --output "$model/$scheme" \
    --model_type wan_dit --quantized --linear_type "$scheme" --non_linear_dtype torch.bfloat16 --save_by_block --verify
