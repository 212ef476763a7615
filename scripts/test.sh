#!/usr/bin/env bash
# Lint, types, import rules, tests. Arguments go to pytest, and then only pytest runs:
#   scripts/test.sh tests/unit -k config
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup_venv.sh"

setup_venv test
if [ $# -gt 0 ]; then
    exec "$PY" -m pytest "$@"
fi
bin=$REPO/.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
exec "$PY" -m pytest -q
