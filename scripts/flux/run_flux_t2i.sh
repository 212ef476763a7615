#!/usr/bin/env bash
# Text to image with FLUX.1 dev or schnell, a directory in diffusers' layout or in the original one, or a single file:
#   MODEL_PATH=~/FLUX.1-dev PROMPT="a cat on a windowsill" scripts/flux/run_flux_t2i.sh
#   MODEL_PATH=~/flux1-schnell-fp8.safetensors CONFIG_JSON=configs/flux/flux_schnell.json scripts/flux/run_flux_t2i.sh
# CONFIG_JSON, PROMPT and RESULT replace what is below; other arguments go to lightx2v.infer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"
: "${MODEL_PATH:?give the path of a FLUX.1 model}"
find_python

exec "$PY" -m lightx2v.infer \
    --model_cls flux \
    --task t2i \
    --model_path "$MODEL_PATH" \
    --config_json "${CONFIG_JSON:-configs/flux/flux_dev.json}" \
    --prompt "${PROMPT:-a red fox in the snow, morning light}" \
    --save_result_path "${RESULT:-outputs/flux_t2i.png}" \
    "$@"
