#!/usr/bin/env bash
# Quantizes the DiT, the text encoder and, for i2v, the image encoder of a Wan2.1 model in the original layout.
#   scripts/convert/quantize_wan_model.sh [int8|fp8|fp8-b128] [t2v|i2v]
# MODEL_PATH names the model (default: the embedded tiny-wan). The result is outputs/<model>-<scheme>/: dit-<task>/,
# t5.safetensors, clip.safetensors. What is there already, whole and of the same source, is kept.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"
find_python

scheme=${1:-int8} task=${2:-t2v}
model=${MODEL_PATH:-lightx2v/assets/tiny-wan}
output=outputs/$(basename "$model")-$scheme
# The text and image encoders are quantized by channel: block scales are for the DiT.
encoder_scheme=${scheme%-b128}

convert() { # KIND SOURCE OUTPUT SCHEME [more arguments]
    local kind=$1 source=$2 target=$3 linear=$4
    shift 4
    "$PY" -m lightx2v.convert -t "$kind" -s "$source" -o "$target" --quantized --linear_type "$linear" \
        --non_linear_dtype torch.bfloat16 "$@"
}

# A model folder that serves both tasks has one DiT at its root and the other in a folder named after the task.
dit=$model
if [ -d "$model/$task" ]; then
    dit=$model/$task
elif [ -d "$model/i2v" ]; then
    dit=$model/diffusion_pytorch_model.safetensors
fi
convert wan_dit "$dit" "$output/dit-$task" "$scheme" --save_by_block
convert wan_t5 "$model" "$output" "$encoder_scheme" --single_file -o_n t5
if [ "$task" = i2v ]; then
    convert wan_clip "$model" "$output" "$encoder_scheme" --single_file -o_n clip
fi
