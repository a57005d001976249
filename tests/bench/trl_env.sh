#!/usr/bin/env bash
# Makes the environment in which the peer, TRL, runs, if it is not there yet, and prints its interpreter's path.
#     trl_env.sh [VERSION]     of TRL; 1.12.0 is the last that still has PPO
# It lies in the user's cache and not in the work tree; torch and transformers are the versions of our own lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

trl=${1:-1.16.0}
uv=$PWD/.tools/bin/uv
locked() { awk -v name="$1" '$0 == "name = \"" name "\"" {getline; gsub(/[^0-9.]/, "", $3); print $3; exit}' uv.lock; }
torch=$(locked torch) transformers=$(locked transformers) peft=$(locked peft)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/finetune/bench/trl-$trl-torch-$torch-transformers-$transformers

if ! [ -e "$folder/.complete" ]; then
  rm -rf "$folder"
  "$uv" venv --quiet --python .venv/bin/python "$folder"
  "$uv" pip install --quiet --python "$folder" \
    "trl==$trl" "torch==$torch" "transformers==$transformers" "peft==$peft" accelerate datasets
  touch "$folder/.complete"
fi
echo "$folder/bin/python"
