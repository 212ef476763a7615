#!/usr/bin/env bash
# Installs this package and the libraries that `lightx2v bench --peers` knows into build/peers, an environment of their own.
# One that cannot be installed is left out, and the benchmarks say so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/setup_venv.sh"
find_python

"$PY" -m venv build/peers
pip=(build/peers/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt)
"${pip[@]}" -e . accelerate
for library in torchao optimum-quanto bitsandbytes sdnq openvino; do
    "${pip[@]}" "$library" || echo "$library is left out" >&2
done
