#!/usr/bin/env bash
# From a fresh clone to a video: makes .venv, runs the embedded tiny-wan, and shows where the result lies.
#   scripts/quickstart.sh ["a blue square on a black background grows"]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup_venv.sh"

setup_venv
prompt=${1:-a red circle on a white background moves right}
start=$SECONDS
"$PY" -m lightx2v.infer --prompt "$prompt" --save_result_path outputs/quickstart.mp4
"$PY" - outputs/quickstart.mp4 outputs/quickstart.png <<'PYTHON'
import sys

from lightx2v.io.media import read_metadata, read_video, write_result

video, sheet = sys.argv[1:]
write_result(read_video(video), sheet, 1, read_metadata(video))
PYTHON
echo "'$prompt', in $((SECONDS - start)) s:"
echo "  video          $REPO/outputs/quickstart.mp4"
echo "  contact sheet  $REPO/outputs/quickstart.png"
