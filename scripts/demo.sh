#!/usr/bin/env bash
# From a fresh clone to a language model trained here, in about five minutes on two cores.
#
#   bash scripts/demo.sh [flags of scripts/pretrain.py]
#
# Makes .venv in this checkout, installs minillm into it, trains on the source of Python's own standard library, saves in
# Hugging Face format, loads back and writes with it. Downloads Python packages, no text and no model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

make_venv plot

output=runs/demo
if [ -f "$output/state.safetensors" ]; then
    echo "going on with the training that was stopped"
    start=--resume
else
    echo "training for three and a half minutes; Ctrl-C saves what is there, and this command goes on with it"
    start=--overwrite
fi
.venv/bin/python scripts/pretrain.py --output "$output" "$start" --minutes 3.5 "$@"

cat <<END

The model is in $output, its curve in $output/curve.png. Three things to try:

  .venv/bin/minillm info $output
  .venv/bin/minillm generate $output "class Queue:" --temperature 0.8 --seed 1
  .venv/bin/python scripts/pretrain.py --text DIR --minutes 30 --output runs/mine      # any folder of text
END
