#!/usr/bin/env bash
# Text to video. As it is, on the embedded tiny-wan; on real weights with MODEL_PATH set, for example
#   MODEL_PATH=~/Wan2.1-T2V-1.3B PROMPT="a cat walks on the grass" scripts/wan/run_wan_t2v.sh
# CONFIG_JSON, PROMPT and RESULT replace what is below; other arguments go to lightx2v.infer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"
find_python

if [ -n "${MODEL_PATH:-}" ]; then
    config=configs/wan/wan_t2v_480p.json
else
    config=configs/wan/wan_t2v.json
fi
exec "$PY" -m lightx2v.infer \
    --model_cls wan2.1 \
    --task t2v \
    --model_path "${MODEL_PATH:-lightx2v/assets/tiny-wan}" \
    --config_json "${CONFIG_JSON:-$config}" \
    --prompt "${PROMPT:-a blue triangle on a black background moves up}" \
    --save_result_path "${RESULT:-outputs/wan_t2v.mp4}" \
    "$@"
