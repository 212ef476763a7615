#!/usr/bin/env bash
# Image and text to video. As it is, on the embedded tiny-wan; on real weights with MODEL_PATH set, for example
#   MODEL_PATH=~/Wan2.1-I2V-14B-480P IMAGE_PATH=cat.png PROMPT="the cat walks away" scripts/wan/run_wan_i2v.sh
# CONFIG_JSON, IMAGE_PATH, PROMPT and RESULT replace what is below; other arguments go to lightx2v.infer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"
find_python

if [ -n "${MODEL_PATH:-}" ]; then
    config=configs/wan/wan_i2v_480p.json
else
    config=configs/wan/wan_i2v.json
fi
exec "$PY" -m lightx2v.infer \
    --model_cls wan2.1 \
    --task i2v \
    --model_path "${MODEL_PATH:-lightx2v/assets/tiny-wan}" \
    --config_json "${CONFIG_JSON:-$config}" \
    --image_path "${IMAGE_PATH:-scripts/wan/first_frame.png}" \
    --prompt "${PROMPT:-an orange square on a gray background moves left}" \
    --save_result_path "${RESULT:-outputs/wan_i2v.mp4}" \
    "$@"
