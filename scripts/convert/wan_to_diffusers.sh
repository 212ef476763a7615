#!/usr/bin/env bash
# Renames the DiT of a Wan2.1 model from the original layout to diffusers' layout.
#   scripts/convert/wan_to_diffusers.sh
# SOURCE names a file or a folder of DiT weights (default: the embedded tiny-wan's), OUTPUT where to write.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/setup_venv.sh"
find_python

exec "$PY" -m lightx2v.convert \
    --model_type wan_dit \
    --direction forward \
    --source "${SOURCE:-lightx2v/assets/tiny-wan/diffusion_pytorch_model.safetensors}" \
    --output "${OUTPUT:-outputs/tiny-wan-diffusers/transformer}" \
    --output_name diffusion_pytorch_model \
    --single_file
