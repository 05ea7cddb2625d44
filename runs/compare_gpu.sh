#!/usr/bin/env bash
# The whole comparison on a GPU: every method, TOFU's three splits and fictitious people, 3 seeds.
#
#   runs/compare_gpu.sh BASE TOFU_FOLDER OUTPUT
#
# Finished runs are kept; a second call goes on where the first one stopped.
set -euo pipefail
base=$1 tofu=$2 output=$3

edits=(tv perta-grad perta-fisher perta:order=0.5 perta:order=4 random
    perta-input perta-input:rho=10,forget_damping=0 perta-input:rho=100,forget_damping=0
    perta-input:rho=10,forget_damping=3 perta-input:rho=10,forget_damping=10 perta-input:rho=1000,forget_damping=300
    perta-input:forget_damping=10 perta-input:forget_damping=100 perta-input:rho=10000,forget_damping=3000
    perta-input:damping=0.001 perta-input:damping=0.1
    perta-input:tokens=answer perta-input:at=full perta-input:share=0.2 perta-input:share=0.05
    'perta-input:include=*.mlp.*' 'perta-input:include=*.self_attn.*' perta-kron
    msa selective ssd:selection=2 ties dare negmerge interpolate tv:forget_seeds=3
    ga graddiff npo npo-retain simnpo dpo idkpo kl undial wga satimp retain-finetune
    rmu:steering_coef=240,retain_weight=1)
arguments=()
for method in "${edits[@]}"; do arguments+=(--methods "$method"); done
for seed in 0 1 2; do arguments+=(--seeds "$seed"); done

for split in forget01 forget05 forget10; do
    perta bench compare --base "$base" --tofu "$tofu" --tofu-split "$split" --suite \
        --output "$output/$split" "${arguments[@]}"
done
for people in 20 40; do
    perta bench compare --base "$base" --people "$people" --forget-people 2 --questions 10 --suite \
        --output "$output/people-$people" "${arguments[@]}"
done
