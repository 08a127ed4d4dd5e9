#!/usr/bin/env bash
# From a fresh clone to a language model trained and fine-tuned here, in about six minutes on two cores.
#
#   bash scripts/demo.sh [flags of scripts/pretrain.py]
#
# Makes .venv in this checkout, installs minillm into it, then
#   1. trains on the source of Python's own standard library, saves in Hugging Face format, loads back, writes with it;
#   2. fine-tunes it, by LoRA on an int8 base, to write a function's body from its signature and docstring;
#   3. counts how many bodies parse, before and after, on functions that neither training has seen.
# Downloads Python packages, no text and no model. Run again, it goes on where it was stopped and repeats nothing that is
# finished; with flags, such as --overwrite, it starts anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

make_venv plot

python=.venv/bin/python
base=runs/demo
bodies=$base-bodies
adapter=$base-adapter
counted=$bodies/counted.txt

# finished FILE SINCE: FILE is there, and was made after SINCE, so that a base trained anew takes all that follows with it
finished() { [ -f "$1" ] && [ "$1" -nt "$2" ]; }

# how_to_start FOLDER SINCE: the flag for a run in FOLDER that may have been stopped
how_to_start() { if finished "$1/state.safetensors" "$2"; then echo --resume; else echo --overwrite; fi; }

if [ -f $base/state.safetensors ] && [[ " $* " != *" --overwrite "* ]]; then
    echo "going on with the training that was stopped"
    $python scripts/pretrain.py --output $base --resume --minutes 3.5 --held-out 0.1 "$@"
elif [ -f $base/config.json ] && [ $# -eq 0 ]; then
    echo "using the model in $base as it is; bash scripts/demo.sh --overwrite trains it anew"
else
    echo "training for three and a half minutes; Ctrl-C saves what is there, and this command goes on with it"
    $python scripts/pretrain.py --output $base --overwrite --minutes 3.5 --held-out 0.1 "$@"
fi

if ! finished $bodies/held_out.jsonl $base/config.json; then
    echo "looking for functions to learn from, and for others to ask for"
    status=0
    $python scripts/mine_bodies.py --model $base --output $bodies || status=$?
    if [ $status -eq 2 ] && [[ " $* " == *" --text"[\ =]* ]]; then  # perhaps without Python in it; its reason is above
        echo "without functions there is nothing to fine-tune for; the model is in $base"
        exit 0
    fi
    [ $status -eq 0 ] || exit $status
fi

if ! finished $adapter/adapter_config.json $bodies/held_out.jsonl; then
    echo "fine-tuning for a minute, adapters on an int8 base"
    $python scripts/sft.py --model $base --data $bodies/train.jsonl --output $adapter --quantize int8 \
        --rank 16 --alpha 32 --learning-rate 6e-3 --patience 5 --minutes 1 \
        "$(how_to_start $adapter $bodies/held_out.jsonl)"
fi

if ! finished $counted $adapter/adapter_config.json; then
    echo "asking for the bodies of functions that neither training has seen"
    $python scripts/count_bodies.py --model $base --quantize int8 --adapter $adapter --data $bodies/held_out.jsonl \
        --output $bodies/answers.jsonl > $counted.unfinished
    mv $counted.unfinished $counted
fi
cat $counted

cat <<END

The model is in $base, its curve in $base/curve.png; the adapter in $adapter, every answer in $bodies/answers.jsonl.
Four things to try:

  .venv/bin/minillm info $base
  .venv/bin/minillm generate $base "class Queue:" --temperature 0.8 --seed 1
  .venv/bin/minillm adapter $adapter --base $base
  .venv/bin/python scripts/pretrain.py --text DIR --minutes 30 --output runs/mine      # any folder of text
END
