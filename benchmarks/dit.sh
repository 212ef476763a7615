#!/usr/bin/env bash
# One forward pass of Wan2.1 1.3B at 832x480, 5 frames, random weights, against diffusers. Arguments win.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec "$PY" -m lightx2v bench dit --model wan-1.3b --size 832x480 --frames 5 --mm_type Default,int8,fp8 \
    --peers diffusers,diffusers-compile --markdown "$RESULT" "$@"
