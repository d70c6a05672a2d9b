#!/usr/bin/env bash
# Runs the commands of a case file and compares what they print with what is written there.
#   tests/cli/run.sh COIL CASES…         exit 0: all as written, 1: not, 77: the file needs what is not here
#
# A case file holds cases, one after another:
#   # comment
#   needs PATH-OR-PROGRAM      the file is skipped (77) where a path does not exist or a program is not found
#   $ coil info MODEL          a line for bash, run in a folder of its own that all cases of the file share
#   1> text                    the lines of standard output, all of them, to rounding (tests/same_text.awk); without any,
#                              it is not compared
#   1~ regex                   one line of standard output matches (extended regular expression)
#   2> text                    one line of standard error is this
#   2~ regex                   one line of standard error matches
#   2! regex                   no line of standard error matches
#   ? 1                        exit status; 0 where not written
# The commands see coil on PATH and $SOURCE (the source tree), $CASES (tests/cli), $DATA (real data, COIL_DATA).
set -u
coil=$(realpath "$1"); shift
CASES=$(realpath "$(dirname "$0")"); SOURCE=$(realpath "$CASES/../.."); DATA=${COIL_DATA:-$SOURCE/../shared/data}
export CASES SOURCE DATA
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir "$work/bin"; ln -s "$coil" "$work/bin/coil"; export PATH="$work/bin:$PATH"
ran=0 failed=0 skipped=0

complain() { printf 'FAILED %s:%s: %s\n  $ %s\n' "$file" "$line_of_case" "$1" "$command"; bad=1; }
has_line() { grep -Fxq -- "$2" "$1"; }
has_match() { grep -Eq -- "$2" "$1"; }

run_case() {
  [ -n "$command" ] || return 0
  local found=0 bad=0
  (cd "$work/run" && timeout 300 bash -o pipefail -c "$command" >"$work/out" 2>"$work/err" </dev/null) || found=$?
  ran=$((ran + 1))
  [ "$found" = "$status" ] || complain "exit status $found, expected $status"
  if [ -s "$work/expected" ] && ! awk -f "$SOURCE/tests/same_text.awk" "$work/expected" "$work/out"; then
    complain 'standard output differs (< expected, > found):'; diff "$work/expected" "$work/out"
  fi
  local i
  for i in "${!checks[@]}"; do
    local text=${checks[$i]:3}
    case ${checks[$i]:0:2} in
      '1~') has_match "$work/out" "$text" || complain "no line of standard output matches: $text" ;;
      '2>') has_line "$work/err" "$text" || complain "not on standard error: $text" ;;
      '2~') has_match "$work/err" "$text" || complain "no line of standard error matches: $text" ;;
      '2!') ! has_match "$work/err" "$text" || complain "standard error has a line that matches: $text" ;;
    esac
  done
  if [ $bad = 1 ]; then
    failed=$((failed + 1)); echo '  standard error was:'; sed 's/^/    /' "$work/err" | head -n 20
  fi
  command=
}

run_file() {
  file=$1
  rm -rf "$work/run"; mkdir "$work/run"
  local line number=0
  command=
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    case $line in
      ''|'#'*) ;;
      'needs '*)
        local what; what=$(eval "echo \"${line#needs }\"")
        if ! [ -e "$what" ] && ! command -v "$what" >/dev/null; then
          echo "skipped $file: needs $what"; skipped=$((skipped + 1)); return
        fi ;;
      '$ '*) run_case; command=${line#'$ '} line_of_case=$number status=0 checks=(); : >"$work/expected" ;;
      '1> '*) printf '%s\n' "${line#'1> '}" >>"$work/expected" ;;
      '1>') echo >>"$work/expected" ;;
      '1~ '*|'2> '*|'2~ '*|'2! '*) checks+=("$line") ;;
      '? '*) status=${line#'? '} ;;
      *) echo "FAILED $file:$number: not a line of a case file: $line"; failed=$((failed + 1)) ;;
    esac
  done <"$file"
  run_case
}

for cases in "$@"; do run_file "$cases"; done
echo "$ran commands, $failed failed, $skipped files skipped"
[ $failed = 0 ] || exit 1
[ $ran -gt 0 ] || exit 77
