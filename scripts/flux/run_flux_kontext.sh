#!/usr/bin/env bash
# Edit a picture with FLUX.1 Kontext; with another CONFIG_JSON, image to image by strength with FLUX.1 dev:
#   MODEL_PATH=~/FLUX.1-Kontext-dev IMAGE_PATH=cat.png PROMPT="give the cat a hat" scripts/flux/run_flux_kontext.sh
# CONFIG_JSON, IMAGE_PATH, PROMPT and RESULT replace what is below; other arguments go to lightx2v.infer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"
: "${MODEL_PATH:?give the path of a FLUX.1 Kontext model}"
find_python

exec "$PY" -m lightx2v.infer \
    --model_cls flux \
    --task i2i \
    --model_path "$MODEL_PATH" \
    --config_json "${CONFIG_JSON:-configs/flux/flux_kontext.json}" \
    --image_path "${IMAGE_PATH:-scripts/wan/first_frame.png}" \
    --prompt "${PROMPT:-make the background blue}" \
    --save_result_path "${RESULT:-outputs/flux_kontext.png}" \
    "$@"
