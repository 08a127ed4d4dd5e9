#!/usr/bin/env bash
# The native tests under AddressSanitizer and UBSan: any read or write outside, any undefined behaviour ends the run.
#
#   bash scripts/sanitize.sh [pytest arguments]
#
# Builds the module with the sanitizers into a temporary folder and tests that copy; the checkout's own stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

flags="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
cp -r minillm csrc tests setup.py pyproject.toml README.md LICENSE "$folder"
rm -f "$folder"/minillm/_cpu*.so
cd "$folder"
CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" MINILLM_NATIVE=1 \
    "$OLDPWD/$python" setup.py -q build_ext --inplace

# Python itself leaks at exit, torch's OpenMP threads too: only errors in memory's use are looked for.
preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$OLDPWD/$python" -m pytest -q -p no:cacheprovider tests/native "$@"
