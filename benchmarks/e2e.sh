#!/usr/bin/env bash
# Whole runs, stage by stage: tiny-wan, or the checkpoint in MODEL_PATH, against diffusers' pipeline. Arguments win.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec "$PY" -m lightx2v bench e2e ${MODEL_PATH:+--model_path "$MODEL_PATH"} --mm_type Default,int8 --peers diffusers \
    --markdown "$RESULT" "$@"
