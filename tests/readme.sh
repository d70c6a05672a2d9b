#!/usr/bin/env bash
# Runs the README's examples: tests/readme.sh COIL. Every line "$ command" of its console blocks runs, in order, in one
# folder where .cache/ is the source tree's; what stands under a command is what it must print on standard
# output. In blocks called "shell" (progress and timings differ from run to run) only the exit status counts.
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
"$source/scripts/genome" >/dev/null || { echo 'skipped: the genome of the examples cannot be fetched'; exit 77; }
cases=$(mktemp); trap 'rm -f "$cases"' EXIT
echo "\$ ln -s $source/.cache ." >"$cases"
awk '/^```console/ { inside = compare = 1; next } /^```shell/ { inside = 1; compare = 0; next } /^```/ { inside = 0 }
     !inside { next }
     /^\$ / { print; next }
     compare { print ($0 == "" ? "1>" : "1> " $0) }' "$source/README.md" >>"$cases"
"$source/tests/cli/run.sh" "$1" "$cases"
