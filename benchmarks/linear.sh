#!/usr/bin/env bash
# Quantize and multiply at the sizes of Wan2.1 1.3B, every library of the engine and every peer. Arguments win.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec "$PY" -m lightx2v bench linear --shapes wan-1.3b --rows 1024,4096 --peers all --markdown "$RESULT" "$@"
