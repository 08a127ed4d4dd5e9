# Sourced by demo.sh and test.sh: `make_venv EXTRA` makes .venv with minillm[EXTRA] in it, or reuses the one there.

make_venv() {
    local extra=$1 python=${PYTHON:-python3} stamp=.venv/.minillm-$1 wanted
    if ! command -v "$python" > /dev/null; then
        echo "minillm: $python is missing; install Python 3.10 or newer, or set PYTHON" >&2
        exit 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "minillm: $("$python" --version) is too old; install Python 3.10 or newer, or set PYTHON" >&2
        exit 2
    fi
    wanted=$(cat pyproject.toml setup.py scripts/constraints.txt csrc/cpu/* 2> /dev/null | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ]; then
        echo "minillm: .venv is up to date"
        return
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "minillm: installing into .venv, pinned by scripts/constraints.txt ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt \
        --editable ".[$extra]"
    echo "$wanted" > "$stamp"
}
