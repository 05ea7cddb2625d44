#!/usr/bin/env bash
# The whole comparison on a GPU: every method, TOFU's three splits and fictitious people, 3 seeds.
#
#   runs/compare_gpu.sh BASE TOFU_FOLDER OUTPUT [GENERAL_TEXT]
#
# GENERAL_TEXT: a file of rows that have nothing to do with either set, for the edit that protects them as well.
# Finished runs are kept; a second call goes on where the first one stopped.
set -euo pipefail
base=$1 tofu=$2 output=$3 general=${4:-}

edits=(tv perta-grad perta-fisher perta:order=0.5 perta:order=4 random
    perta-project perta-project:rho=0.3 perta-project:rho=1 perta-project:rho=10 perta-project:rho=100
    perta-project:tokens=answer perta-project:at=full perta-project:share=0.2 perta-project:share=0.05
    perta-project:layers=all 'perta-project:include=*.layers.2[0-9].mlp.*'
    'perta-project:include=*.self_attn.*' perta-project:forget_seeds=3
    perta-input perta-input:rho=10,forget_damping=0 perta-input:rho=10,forget_damping=10 perta-kron
    msa selective ssd:selection=2 ties dare negmerge interpolate tv:forget_seeds=3
    ga graddiff npo npo-retain simnpo dpo idkpo kl undial wga satimp retain-finetune
    rmu:steering_coef=240,retain_weight=1)
arguments=()
if [[ -n $general ]]; then
    arguments+=(--general "$general")
    edits+=('perta-project:general=true')
fi
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

# What may break an edit: a full model tuned by LoRA, and one stored in the base's own type.
harder=(--people 20 --forget-people 2 --questions 10 --methods tv --methods perta-fisher
    --methods perta-project --methods perta-project:layers=all)
perta bench compare --base "$base" "${harder[@]}" --lora-rank 16 --learning-rate 1e-3 --output "$output/lora"
perta bench compare --base "$base" "${harder[@]}" --save-dtype base --output "$output/stored"
