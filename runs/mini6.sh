#!/usr/bin/env bash
# Trains the mini model in six languages, in three moves: English, six languages, real speech mixed in. Every stage resumes where
# it was interrupted and is skipped once it is done.
#   runs/mini6.sh whisper-base   with the ears of Whisper base (the folder of recipes/mini-whisper-base.yaml)
#   runs/mini6.sh mini           with an encoder of our own, which learns from Whisper base's
# Needs espeak-ng, the package's extra `lexicon`, and the speech and text data described in docs/training.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
shared=${DATA:-../shared}
front_end=${1:?whisper-base or mini}
run=runs/mini6
presets=src/diffusion_gemma_asr/presets
codes="en de fr es hi zh"
declare -A sentences=([en]=16000 [de]=12000 [fr]=12000 [es]=12000 [hi]=8000 [zh]=12000)
declare -A more=([en]=20000 [de]=20000 [fr]=20000 [es]=20000 [hi]=8400 [zh]=20000)
# Without these PyTorch on CPU spends much of its time handing memory back and spinning.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456 OMP_WAIT_POLICY=passive

stage() { echo "== $1 ($(date +%H:%M:%S))"; }

# made FILE COMMAND...: runs the command unless the file is there
made() { local file=$1; shift; [ -f "$file" ] || "$@"; }

stage "synthetic speech: held-out, monitor and training lists"
for code in $codes; do
  synth="$python -m diffusion_gemma_asr.data.synth --text $shared/text/$code.txt --language $code"
  heldout=runs/mini/heldout-$code/manifest.jsonl dev=runs/mini/dev-$code/manifest.jsonl
  if [ $code = en ]; then
    made $heldout $python -m diffusion_gemma_asr.data.synth --text recipes/lists/heldout-en.txt --seed 2026 \
      --held_out_voices --out runs/mini/heldout-en
    made $dev $synth --count 200 --seed 77 --held_out_voices --out runs/mini/dev-en
    made runs/mini/synth-en/manifest.jsonl $synth --count ${sentences[en]} --seed 1 --exclude $dev --out runs/mini/synth-en
  else
    made $heldout $synth --count 300 --seed 2026 --held_out_voices --out runs/mini/heldout-$code
    made $dev $synth --count 100 --seed 77 --held_out_voices --exclude $heldout --out runs/mini/dev-$code
    made runs/mini/synth-$code/manifest.jsonl $synth --count ${sentences[$code]} --seed 1 --rooms 0.25 --telephones 0.1 \
      --exclude $heldout $dev --out runs/mini/synth-$code
  fi
done

if [ "$front_end" = mini ]; then
  stage "more synthetic speech, which only the encoder of our own hears"
  for code in $codes; do
    made runs/mini/more-$code/manifest.jsonl $python -m diffusion_gemma_asr.data.synth --text $shared/text/$code.txt \
      --language $code --count ${more[$code]} --seed 2 --rooms 0.25 --telephones 0.1 \
      --exclude runs/mini/{heldout,dev}-$code/manifest.jsonl --out runs/mini/more-$code
  done
fi

stage "tokenizer"
texts=$(for code in $codes; do echo "$shared/text/$code.txt"; done)
made $run/tokenizer/tokenizer.json $python -m diffusion_gemma_asr.train.tokenizer $run/tokenizer $texts \
  "$shared"/speech/{en,de,zh}-train.jsonl

# Sentences that models are judged by, which the next two do not see.
judged="$(echo runs/mini/{heldout,dev}-{en,de,fr,es,hi,zh}/manifest.jsonl "$shared"/speech/{en,de,fr,es,hi,zh}-dev.jsonl \
  examples/{en,de,fr,es,hi,zh}.txt)"
stage "language model of drafts"
made $run/ngram.npz $python -m diffusion_gemma_asr.train.ngram $run/tokenizer $run/ngram.npz $texts \
  "$shared"/speech/{en,de,zh}-train.jsonl \
  --order 4 --least 2 --exclude $judged

stage "language model of word classes"
made $run/classes.npz $python -m diffusion_gemma_asr.train.word_classes $run/classes.npz $texts \
  "$shared"/speech/{en,de,zh}-train.jsonl --exclude $judged

if [ "$front_end" = mini ]; then
  stage "language model of whole sentences: 6 minutes on an H100; without a GPU LM_MINUTES says when each part is to end"
  sentences="$python -m diffusion_gemma_asr.train.recurrent_lm $run/tokenizer"
  limit=${LM_MINUTES:+--minutes $LM_MINUTES}
  monitor=$(echo runs/mini/dev-{en,de,fr,es,hi,zh}/manifest.jsonl)
  made $run/recurrent-1.safetensors $sentences $run/recurrent-1.safetensors $texts "$shared"/speech/{en,de,zh}-train.jsonl \
    --exclude $judged --dev $monitor --epochs 23 $limit
  made $run/recurrent.safetensors $sentences $run/recurrent.safetensors $texts "$shared"/speech/{en,de,zh}-train.jsonl \
    --exclude $judged --dev $monitor --start_from $run/recurrent-1.safetensors --dropout 0.5 --epochs 9.5 --lr 1.3e-3 \
    --seed 2 $limit
fi

stage "pronouncing dictionary"
made $run/lexicon.npz $python -m diffusion_gemma_asr.train.lexicon $run/lexicon.npz $texts "$shared"/speech/{en,de,zh}-train.jsonl \
  --exclude $judged

stage "backbone, on text in six languages, from the one of mini"
made $run/backbone/model.safetensors $python -m diffusion_gemma_asr.train.text recipes/mini6/1-backbone.yaml $run \
  --start_from $presets/mini/backbone

train="$python -m diffusion_gemma_asr train"
reading="$python -m diffusion_gemma_asr.train.reading"
ears=runs/mini-whisper-base recipes=recipes/mini-whisper-base
stage "move 1, English, with Whisper base's ears: projector by CTC, then with the backbone"
made $ears/english-ctc/projector/adapter.safetensors $reading $recipes/1-english-ctc.yaml $ears/english-ctc
made $ears/english/projector/adapter.safetensors $reading $recipes/2-english.yaml $ears/english
stage "move 2, six languages: projector by CTC, then with the backbone"
made $ears/languages-ctc/projector/adapter.safetensors $reading $recipes/3-languages-ctc.yaml $ears/languages-ctc
made $ears/languages/projector/adapter.safetensors $reading $recipes/4-languages.yaml $ears/languages
# The encoder of our own needs what this leaves as well: Whisper base's frames of the real speech.
stage "move 3, real speech mixed in: projector by CTC"
made $ears/real-ctc/checkpoint/adapter.safetensors $train $recipes/5-real-ctc.yaml
if [ "$front_end" = whisper-base ]; then
  name=mini-whisper-base out=$ears out_recipes=$recipes recipe=recipes/mini-whisper-base.yaml
  from_hub="--encoder openai/whisper-base --lm ../mini6/ngram.npz"
  stage "move 3: projector and LoRA"
  made $out/checkpoint/adapter.safetensors $train $recipe
else
  name=mini6 out=$run out_recipes=recipes/mini6 recipe=recipes/mini6.yaml from_hub=
  distil="$python -m diffusion_gemma_asr.train.distill"
  both_cores="$python -m torch.distributed.run --nproc_per_node 2 -m diffusion_gemma_asr"
  stage "an encoder of our own: by Whisper base's frames of synthetic and real speech, then by CTC as well"
  made $run/distilled/encoder/model.safetensors $distil recipes/mini6/2-encoder.yaml $run/distilled \
    --start_from $presets/mini
  made $run/hearing/projector/adapter.safetensors $distil recipes/mini6/3-encoder-ctc.yaml $run/hearing --start_from $run/distilled
  stage "without its teacher, by CTC alone"
  OMP_NUM_THREADS=1 made $run/continued/projector/adapter.safetensors \
    $both_cores.train.distill recipes/mini6/4-encoder-continued.yaml $run/continued --start_from $run/hearing
  stage "a deeper projector with shorter slots, by CTC on its frames; then with the backbone"
  OMP_NUM_THREADS=1 made $run/projector/checkpoint/adapter.safetensors $both_cores train $out_recipes/5-projector.yaml
  OMP_NUM_THREADS=1 made $run/reading/projector/adapter.safetensors \
    $both_cores.train.reading $out_recipes/6-reading.yaml $run/reading
  stage "a branch of the projector that spells in characters"
  OMP_NUM_THREADS=1 made $run/speller/checkpoint/adapter.safetensors $both_cores train $out_recipes/7-speller.yaml
  stage "which spells in phonemes as well"
  OMP_NUM_THREADS=1 made $run/phonemes/checkpoint/adapter.safetensors $both_cores train $out_recipes/8-phonemes.yaml
  stage "projector and LoRA on its frames"
  made $run/checkpoint/adapter.safetensors $train $recipe
fi

stage "the yardstick: Whisper's decoder on the same frames"
made $out/whisper-decoder/checkpoint/decoder.safetensors $train $out_recipes/whisper-decoder.yaml

stage "bundle"
$python -m diffusion_gemma_asr.train.bundle $recipe $out $presets/$name --card $out_recipes/card.yaml $from_hub

stage "evaluation: the moves, held-out synthetic speech and the real dev lists; curves"
$python benchmarks/moves.py measure $(basename $out)
$python benchmarks/languages.py measure $name
$python benchmarks/training_curves.py $(basename $out)
stage "done"
