#!/usr/bin/env bash
# Everything that a short loan of an H200 must show, in under 9 minutes: first that the kernels are right, then how fast.
# Writes h200.json and h200.md into OUT (default: outputs/h200). --dry-run does it all on a CPU, small, interpreted.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
for word in "$@"; do
    if [ "$word" = --dry-run ]; then export TRITON_INTERPRET=1; fi
done
exec "$PY" benchmarks/h200.py --out "${OUT:-outputs/h200}" "$@"
