#!/usr/bin/env bash
# All that a short time on a GPU is for, in one command: gpu_session.sh FOLDER [SECONDS]
#
# The kernels' and the engine's tests on the GPU, block sizes of the expert kernels (they go to backend/kernels/tuned and into
# FOLDER), then every benchmark with transformers as peer. Each part has a share of SECONDS (default 570) and is ended when it
# is used up; what has been measured by then is in FOLDER. Status 0 if every part succeeded.
#
# SHAPE (default qwen1.5-moe-a2.7b) names the model, PYTHON the interpreter (default .venv/bin/python, else python3). With
# DEVICE=interpreter it runs without a GPU, on Triton's interpreter and a tiny model: only to see that everything works.
set -uo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 FOLDER [SECONDS]" >&2
  exit 2
fi
folder=$(realpath -m "$1")
seconds=${2:-570}
device=${DEVICE:-cuda}
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
# COLUMNS: the width of tables, which are not cut where the output is no terminal.
export PYTHONUNBUFFERED=1 COLUMNS=160 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"
status=0

left() { echo $((seconds - SECONDS)); }

# part NAME SECONDS COMMAND…: run with a time limit; its output goes to the screen and FOLDER/NAME.log.
part() {
  local name=$1 limit=$2 result
  shift 2
  echo "== $name, at most $limit s"
  # Interrupted, pytest still says what has failed.
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
  result=${PIPESTATUS[0]}
  echo "== $name ended with status $result after $SECONDS s in all" | tee -a "$folder/parts.txt"
  [ "$result" -eq 0 ] || status=1
}

{ date -u; nvidia-smi; "$python" -c 'import torch, triton, transformers as t; print(torch.__version__, triton.__version__, t.__version__)'; } \
  > "$folder/machine.txt" 2>&1

tests=(-m pytest tests/engine/test_cuda_graphs.py tests/engine/test_sampler.py tests/engine/test_async.py tests/kernels/gpu -v --tb=short -p no:cacheprovider)
# Most of the time is compiling, which several processes share.
"$python" -c 'import xdist' 2> /dev/null && tests+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
if [ "$device" = interpreter ]; then
  tests+=(-k "test_rms_norm or test_align")
  tune=(--device interpreter --shape tiny --tokens 1 --united-ways 4 --folder "$folder/tuned")
  bench=(--device interpreter --shape tiny --runs 1)
else
  tests+=(-m gpu)
  # The slots of the engine that is measured after it.
  tune=(--device "$device" --shape "${SHAPE:-qwen1.5-moe-a2.7b}" --united-ways 2 4 8)
  bench=(--device "$device" --shape "${SHAPE:-qwen1.5-moe-a2.7b}" --peer transformers)
fi

part tests $((seconds * 27 / 100)) "$python" "${tests[@]}"
limit=$((seconds * 25 / 100))
search=$((limit * 8 / 10))
[ "$device" = interpreter ] && search=$((limit / 10)) # candidates say nothing there
part tune "$limit" "$python" -m loadtest.bench tune "${tune[@]}" --budget-s "$search"
[ "$device" = interpreter ] || cp -r backend/kernels/tuned "$folder/" 2> /dev/null
limit=$(left)
part bench "$limit" "$python" -m loadtest.bench all "${bench[@]}" --budget "$((limit * 85 / 100))s" --json "$folder/bench.json"
exit $status
