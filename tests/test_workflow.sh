#!/usr/bin/env bash
# Four shards under Snakemake are one run: tests/test_workflow.sh COIL
set -eu
coil=$(realpath "$1") source=$(cd "$(dirname "$0")/.." && pwd)
command -v snakemake >/dev/null || { echo 'skipped: no snakemake'; exit 77; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
awk 'BEGIN { srand(3); for (i = 0; i < 120; i++) { n = 50 + int(900 * rand()); printf ">r%d\n", i
  for (j = 0; j < n; j++) printf "%s", substr("ACGT", 1 + int(4 * rand()), 1); print "" } }' >x.fa
model=$source/tests/data/tiny-classifier
"$coil" dataset build -o d.h5 x.fa 2>log
"$coil" batch "$model" d.h5 -o one.h5 --task classify --part-size 5k 2>>log
snakemake -s "$source/workflows/Snakefile" --cores 2 --quiet --config model="$model" input=x.fa task=classify shards=4 out=r.h5 \
  coil="$coil" options='--part-size 5k' >>log 2>&1 || { tail -n 20 log >&2; exit 1; }
"$coil" dataset verify r.h5
"$coil" dataset head one.h5 -n 0 >one.tsv 2>>log
"$coil" dataset head r.h5 -n 0 | cmp - one.tsv
[ "$(wc -l <one.tsv)" = 121 ]
echo 'four shards under Snakemake are one run'
