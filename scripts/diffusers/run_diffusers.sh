#!/usr/bin/env bash
# Any pipeline of diffusers, from the directory that its save_pretrained or a download makes:
#   MODEL_PATH=~/stable-diffusion-xl-base-1.0 PROMPT="a cat on a windowsill" scripts/diffusers/run_diffusers.sh
#   MODEL_PATH=~/CogVideoX-5b TASK=t2v CONFIG_JSON=configs/diffusers/cogvideox_fp8_fbcache.json scripts/diffusers/run_diffusers.sh
# TASK (t2i, i2i, t2v, i2v), CONFIG_JSON, PROMPT and RESULT replace what is below; other arguments go to lightx2v.infer,
# such as --image_path.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"
: "${MODEL_PATH:?give the path of a diffusers pipeline}"
find_python

task="${TASK:-t2i}"
case "$task" in
*2v) ending=mp4 ;;
*) ending=png ;;
esac
exec "$PY" -m lightx2v.infer \
    --model_cls diffusers \
    --task "$task" \
    --model_path "$MODEL_PATH" \
    --config_json "${CONFIG_JSON:-configs/diffusers/sdxl.json}" \
    --prompt "${PROMPT:-a red fox in the snow, morning light}" \
    --save_result_path "${RESULT:-outputs/diffusers_$task.$ending}" \
    "$@"
