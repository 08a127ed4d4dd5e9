# Sourced by demo.sh and test.sh from the top of the checkout: `make_venv EXTRA` makes .venv with minillm[EXTRA] in it,
# pinned by scripts/constraints.txt, or takes the one that is there. PYTHON names another interpreter than python3.

fail() { echo "error: $*" >&2; exit 2; }

make_venv() {
    local extra=$1 python=${PYTHON:-python3} stamp=.venv/installed-$1 wanted log
    command -v "$python" > /dev/null || fail "$python is not there; install Python 3.10 or newer, or name one with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version) is too old; install Python 3.10 or newer, or name one with PYTHON=..."

    # What the installation depends on: a second run has nothing to do unless one of these has changed.
    wanted=$({ cat pyproject.toml setup.py scripts/constraints.txt; find csrc -type f -exec cat {} + 2> /dev/null || true; } | cksum)
    if [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ]; then
        echo "using .venv as it is"
        return
    fi
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv || fail "python cannot make environments; on Debian and Ubuntu: apt install python3-venv"
    fi
    echo "installing minillm into .venv (the first time about a minute, most of it torch)"
    log=.venv/install.log
    .venv/bin/python -m pip install --disable-pip-version-check --constraint scripts/constraints.txt --editable ".[$extra]" 2>&1 |
        tee "$log" | show_pip || { tail -n 20 "$log" >&2; fail "pip could not install; the lines above say why"; }
    echo "$wanted" > "$stamp"
}

# pip names what it collects and installs, one package a line; on a terminal those lines become one that is overwritten.
show_pip() {
    if [ -t 1 ]; then
        awk '/^(Collecting|Building|Installing|  Downloading)/ { printf "\r\033[K  %.75s", $0; fflush() } END { printf "\r\033[K" }'
    else
        awk '/^(Installing|Successfully)/ { printf "  %.75s\n", $0; fflush() }'
    fi
}
