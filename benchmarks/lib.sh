# Sourced by the scripts here. Sets PY, a Python that has the peers where install_peers.sh has been run, and RESULT.

source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib/setup_venv.sh"
RESULT=${RESULT:-outputs/benchmarks.md}
if [ -x build/peers/bin/python ]; then
    PY=$REPO/build/peers/bin/python
else
    find_python
fi
