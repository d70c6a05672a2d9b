#!/usr/bin/env bash
# Ctrl-C and SIGTERM at any moment of a training: status 130 or 143, and a checkpoint that --resume goes on from.
# Many times, on one thread and on two: what a signal may damage is seen in a share of the cases only.
#   tests/test_signals.sh COIL
set -u
coil=$(realpath "$1")
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
awk 'BEGIN { srand(3); print "sequence,label"; for (i = 0; i < 400; i++) { s = ""
  for (j = 0; j < 100; j++) s = s substr("ACGT", 1 + int(4 * rand()), 1); print s "," (i % 2 ? "a" : "b") } }' >data.csv
failed=0
for i in $(seq 1 20); do
  signal=INT expected=130
  if [ $((i % 2)) = 0 ]; then signal=TERM expected=143; fi
  rm -rf model
  "$coil" train data.csv --preset dna-tiny --steps 5000 --eval-every 5000 -o model --threads $((1 + i / 11)) \
    >log 2>&1 &
  process=$!
  while [ ! -e model/train/latest ] && kill -0 $process 2>/dev/null; do sleep 0.05; done  # that of step 0
  sleep 0.$((10 + 4 * i))
  kill -$signal $process
  wait $process
  status=$?
  step=$(sed -n 's/^stopped by .* at step \([0-9]*\);.*/\1/p' log)
  if [ $status != $expected ] || [ -z "$step" ]; then
    echo "signal $signal, try $i: status $status, expected $expected:"; tail -n 3 log; failed=1
    continue
  fi
  "$coil" train --resume -o model --max-minutes 0.0001 >log 2>&1
  grep -q "^resumed at step $step " log || { echo "try $i was not resumed at step $step:"; cat log; failed=1; }
done
[ $failed = 0 ] && echo 'signals: 20 of 20 ended with a checkpoint'
exit $failed
