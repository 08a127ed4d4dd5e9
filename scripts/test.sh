#!/usr/bin/env bash
# All tests, on a fresh clone: makes .venv, installs minillm and its oracles, runs pytest. Arguments go to pytest.
#
#   bash scripts/test.sh                     everything but what is marked slow
#   bash scripts/test.sh -m slow             the slow rest
#   bash scripts/test.sh tests/parity -k rw  some of it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

make_venv test
exec .venv/bin/python -m pytest "$@"
