#!/usr/bin/env bash
# Trains the mini model. Every stage resumes where it was interrupted and is skipped once it is done.
#   runs/mini.sh              from nothing
#   runs/mini.sh continue     goes on from the bundled model: its tokenizer and backbone, then its encoder and projector
# Needs espeak-ng, and the speech and text data described in docs/training.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
shared=${DATA:-../shared}
run=runs/mini
preset=src/diffusion_gemma_asr/presets/mini
start=${1:-nothing}
# Without these PyTorch on CPU spends much of its time handing memory back and spinning.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456 OMP_WAIT_POLICY=passive

stage() { echo "== $1 ($(date +%H:%M:%S))"; }

stage "synthetic speech: training, monitor and held-out lists"
synth="$python -m diffusion_gemma_asr.data.synth"
[ -f $run/dev-en/manifest.jsonl ] || $synth --text "$shared/text/en.txt" --count 200 --seed 77 --held_out_voices \
  --out $run/dev-en
[ -f $run/synth-en/manifest.jsonl ] || $synth --text "$shared/text/en.txt" --count 62500 --seed 1 \
  --exclude $run/dev-en/manifest.jsonl --out $run/synth-en
[ -f $run/heldout-en/manifest.jsonl ] || $synth --text recipes/lists/heldout-en.txt --seed 2026 --held_out_voices \
  --out $run/heldout-en

if [ "$start" = continue ] && [ ! -d $run/backbone ]; then
  stage "tokenizer and backbone of the bundled model"
  mkdir -p $run/tokenizer
  cp $preset/backbone/tokenizer* $run/tokenizer/
  cp -r $preset/backbone $run/backbone
fi

stage "tokenizer"
[ -f $run/tokenizer/tokenizer.json ] || $python -m diffusion_gemma_asr.train.tokenizer $run/tokenizer \
  "$shared/text/en.txt" --vocab_size 3072

stage "language model of drafts"
[ -f $run/ngram.npz ] || $python -m diffusion_gemma_asr.train.ngram $run/tokenizer $run/ngram.npz "$shared/text/en.txt" \
  "$shared/speech/en-train.jsonl" --exclude $run/{heldout,dev}-en/manifest.jsonl "$shared/speech/en-dev.jsonl" examples/en.txt

stage "1: backbone, on text"
[ -f $run/backbone/model.safetensors ] || $python -m diffusion_gemma_asr.train.text recipes/mini/1-backbone.yaml $run

stage "2: encoder, as a small Whisper, and projector"
if [ "$start" = continue ]; then
  encoder="recipes/mini/2-encoder-continued.yaml $run --start_from $preset"
else
  encoder="recipes/mini/2-encoder.yaml $run"
fi
[ -f $run/encoder/model.safetensors ] || $python -m diffusion_gemma_asr.train.whisper $encoder

stage "3: backbone, on what the projector writes"
[ -f $run/reading/backbone/model.safetensors ] || \
  $python -m diffusion_gemma_asr.train.reading recipes/mini/3-reading.yaml $run/reading

stage "4: adapter"
[ -f $run/checkpoint/adapter.safetensors ] || $python -m diffusion_gemma_asr train recipes/mini.yaml

stage "bundle"
$python -m diffusion_gemma_asr.train.bundle recipes/mini.yaml $run $preset --card recipes/mini/card.yaml
stage "done"
