#!/usr/bin/env bash
# Runs Wan2.1 with the DiT quantized while it loads; nothing is converted first.
#   scripts/quantization/run_wan_quantized.sh [int8|fp8|fp8-b128] [t2v|i2v] [more arguments of lightx2v.infer]
# MODEL_PATH, PROMPT, IMAGE_PATH and RESULT as in scripts/wan; sizes and steps are those of the model.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"

scheme=${1:-int8} task=${2:-t2v}
shift $(($# < 2 ? $# : 2))
CONFIG_JSON=$REPO/configs/quantization/wan_${scheme//-/_}.json \
    RESULT=${RESULT:-$REPO/outputs/wan_${task}_$scheme.mp4} \
    exec "scripts/wan/run_wan_$task.sh" "$@"
