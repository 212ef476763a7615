#!/usr/bin/env bash
# Runs Wan2.1 with DiT, text encoder and image encoder quantized, from converted files, which it makes if need be.
#   scripts/quantization/run_wan_converted.sh [int8|fp8|fp8-b128] [t2v|i2v] [more arguments of lightx2v.infer]
# MODEL_PATH, PROMPT, IMAGE_PATH and RESULT as in scripts/wan; sizes and steps are those of the model.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"

scheme=${1:-int8} task=${2:-t2v}
shift $(($# < 2 ? $# : 2))
model=${MODEL_PATH:-lightx2v/assets/tiny-wan}
folder=outputs/$(basename "$model")-$scheme

scripts/convert/quantize_wan_model.sh "$scheme" "$task"
paths=(--set "dit_quantized_ckpt=$folder/dit-$task" --set "t5.quantized_ckpt=$folder/t5.safetensors")
if [ "$task" = i2v ]; then
    paths+=(--set "clip.quantized_ckpt=$folder/clip.safetensors")
fi
CONFIG_JSON=$REPO/configs/quantization/wan_${task}_${scheme//-/_}_converted.json \
    RESULT=${RESULT:-$REPO/outputs/wan_${task}_${scheme}_converted.mp4} \
    exec "scripts/wan/run_wan_$task.sh" "${paths[@]}" "$@"
