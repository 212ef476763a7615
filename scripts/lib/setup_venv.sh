# Sourced by the scripts. Sets REPO, the repository's folder, and changes to it; offers setup_venv and find_python.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Paths that the caller gave are relative to the caller's folder.
for _name in MODEL_PATH CONFIG_JSON IMAGE_PATH RESULT SOURCE OUTPUT; do
    case ${!_name:-/} in
        /*) ;;
        *) printf -v "$_name" '%s/%s' "$PWD" "${!_name}" ;;
    esac
done
cd "$REPO" || exit 1

_fail() {
    echo "$(basename "$0"): $1" >&2
    shift
    printf '  %s\n' "$@" >&2
    exit 2
}

# Prints a Python that this project supports: $PYTHON, else python3, else the newest that fits.
_supported_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || break
    done
    _fail "no Python 3.10 to 3.13: '${PYTHON:-python3}' is $("${PYTHON:-python3}" --version 2>/dev/null || echo missing)" \
        "do: install one, or name it: PYTHON=/usr/bin/python3.12 $0"
}

_check_disk() {
    local free
    free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free" -ge 4 ] || _fail "$free GB are free in $REPO; the packages need about 4 GB" "do: free some space"
    [ "$free" -ge 12 ] || echo "note: $free GB are free; torch for NVIDIA GPUs with its libraries takes about 8 GB" >&2
}

_make_venv() {
    local python
    python=$(_supported_python) || exit 2
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        _fail "$python lacks the venv module" "do: install it, for example: apt install python3-venv"
    rm -rf .venv
    "$python" -m venv .venv || _fail "$python -m venv .venv failed" "do: see the message above"
}

# setup_venv [EXTRA]: makes .venv with this package and the extra, unless it is there already. Sets PY, its Python.
setup_venv() {
    local extra=${1:-} want quiet=()
    PY=$REPO/.venv/bin/python
    "$PY" -c '' 2>/dev/null || { _check_disk && _make_venv; }
    # The path is part of the stamp: an environment does not survive a move of its folder.
    want=$( (cat pyproject.toml constraints.txt && pwd && "$PY" --version) | "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ "$(head -n 1 .venv/.installed 2>/dev/null)" = "$want" ] && { [ -z "$extra" ] || grep -qx "$extra" .venv/.installed; }; then
        return
    fi
    _check_disk
    [ -t 1 ] || quiet=(--quiet)
    echo "installing into $REPO/.venv; the first time this takes a few minutes" >&2
    rm -f .venv/.installed
    "$PY" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} -c constraints.txt -e ".${extra:+[$extra]}" ||
        _fail "pip could not install the packages" "do: see the message above, and run $0 again"
    printf '%s\n' "$want" "$extra" >.venv/.installed
}

# find_python: sets PY to a Python that has this package: the active environment's, else that of .venv, made if need be.
find_python() {
    PY=$(command -v python || command -v python3 || true)
    if [ -z "$PY" ] || ! "$PY" -c 'import lightx2v, torch, diffusers, transformers, av, pydantic' 2>/dev/null; then
        setup_venv
    fi
}
