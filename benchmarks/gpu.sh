#!/usr/bin/env bash
# Fifteen minutes of a GPU of 80 GB, what tells most first. Every part is stored as it ends, and not measured again.
#   benchmarks/gpu.sh           figures go to $OUT (default benchmarks/results); PYTHON names the interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-benchmarks/results}
export PYTHONPATH=src:benchmarks PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$out"

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
$python - <<'PYTHON' || exit 1
import torch, transformers
print("torch", torch.__version__, "transformers", transformers.__version__, "CUDA", torch.version.cuda)
assert torch.cuda.is_available(), "torch sees no GPU"
PYTHON

part() { echo "== $1 ($(date +%H:%M:%S))"; shift; "$@" || echo "   exit status $?"; }
measure() { part "$1" timeout 420 $python benchmarks/full_size.py --out "$out/full_size.json" --parts "$1"; }

part "recorded steps on the bundled model" timeout 120 $python benchmarks/recorded_steps.py
# One process each: a part that runs out of memory, or that changes the model, harms no other.
measure 'ours 10 s, batch (1|32), canvas 48, .*'
measure 'generate\(\) 10 s, 8 steps'
measure 'experts in bnb-4bit'
measure 'experts in fp8'
measure 'training step'
measure 'ours 10 s, batch (8|64), canvas 48, .*|ours 30 s, batch (1|8|32), canvas 128, .*'
measure 'experts in torchao-int8'
measure 'ours .*'
