#!/usr/bin/env bash
# Train two models on one GPU, side by side:
#     examples/tiny_vlm/train_gpu.sh FOLDER [MINUTES [ARGUMENTS OF BOTH PROGRAMS ...]]
#
#   fine     tower, then decoder, on 1024 vision tokens: MINUTES in all (5)
#   hybrid   a decoder of convolutions and attention, behind the tower of model/: as long
#
# FOLDER/fine and FOLDER/hybrid get weights in float16 and logs every 20 seconds, so that whatever
# ends this early leaves the latest; checkpoints to go on from stay in CHECKPOINTS (a new folder in
# /tmp). Then on a machine with the newest transformers, of each:
#
#   python examples/tiny_vlm/export.py FOLDER/fine --variant fine
#
# PYTHON names the interpreter (python3), WORKERS the processes that draw pictures, for each model
# (half of the cores), SCENES and HYBRID_SCENES the pictures in a step (64, 32).
set -uo pipefail
[ $# -gt 0 ] || { sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
minutes=${2:-5}
more=("${@:3}")
cd "$(dirname "$0")/../.." || exit
python=${PYTHON:-python3}
checkpoints=${CHECKPOINTS:-$(mktemp -d)}
workers=${WORKERS:-$((($(nproc) + 1) / 2))}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
mkdir -p "$out"

share() { awk "BEGIN { print $minutes * $1 }"; }

train() { # PROGRAM VARIANT SCENES OTHER ARGUMENTS ...
    local program=$1 variant=$2 scenes=$3
    shift 3
    set -- "$@" ${more[@]+"${more[@]}"}
    $python "examples/tiny_vlm/$program.py" "$checkpoints/$variant" --variant "$variant" \
        --scenes "$scenes" --workers "$workers" --every "${EVERY:-20}" --weights "$out/$variant" \
        "$@" 2>&1 | tee -a "$out/$variant.txt" | sed -u "s/^/$variant /"
}

train train_decoder hybrid "${HYBRID_SCENES:-32}" --sparse "$(share 0.5)" --full "$(share 0.5)" &
train train_vision fine "${SCENES:-64}" --minutes "$(share 0.25)" &&
    train train_decoder fine "${SCENES:-64}" --sparse "$(share 0.35)" --full "$(share 0.4)"
status=$?
wait $! || status=1
ls -l "$out"/*
exit $status
