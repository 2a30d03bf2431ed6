#!/usr/bin/env bash
# What only a GPU shows, in about ten minutes on one: `bash benchmarks/gpu.sh TABLE.md`. Needs the packages of pyproject.toml.
# Each part has a limit of its own and prints as it goes, so that what was measured before a break stays.
set -uo pipefail
cd "$(dirname "$0")/.."
table=${1:?name the file for the table}
export PYTHONUNBUFFERED=1 VTP_COMPILE=1

part() { # heading, seconds at most, command
    local heading=$1 limit=$2 began=$SECONDS
    shift 2
    { echo; echo "## $heading"; echo "\`$*\`"; echo '```'; } | tee -a "$table"
    timeout "$limit" "$@" 2>&1 | grep -v Warning | tail -n 25 | tee -a "$table"
    echo "\`\`\`
status ${PIPESTATUS[0]}, $((SECONDS - began)) s" | tee -a "$table"
}

nvidia-smi --query-gpu=name,memory.total --format=csv,noheader | tee "$table"
part "The paper's generator: XL/1 without QK-norm, one pass of 256" 150 \
    env VTP_MICRO_BATCH=256 python -m benchmarks.generator --size XL --batch 256 --latents 1024 --only-ours
part "The same with a residual stream of bfloat16" 100 \
    env VTP_MICRO_BATCH=256 python -m benchmarks.generator --size XL --batch 256 --latents 1024 --only-ours --residual bfloat16
part "What being told captions costs XL/1" 120 \
    python -m benchmarks.text_to_image --size XL --side 16 --channels 64 --patch 1 --tokens 77 --width 768 --batch 64 --rounds 3 --steps 5
part "Sampling of the recipe's generator, guided" 60 python -m benchmarks.sampling --batch 256
part "The same in TF32" 60 python -m benchmarks.sampling --batch 256 --precision tf32
part "The joint step of VTP-L at 64 / 16 / 8" 150 \
    python -m benchmarks.pretrain pipelines/overlays/sizes/L.yaml:pretrain --divide 256
