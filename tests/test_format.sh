#!/usr/bin/env bash
# Every source file is as clang-format 14 writes it. Skipped (77) where that program is not installed.
#   tests/test_format.sh [SOURCE]          to mend: clang-format-14 -i FILE
set -u
cd "${1:-$(dirname "$0")/..}" || exit 2
command -v clang-format-14 >/dev/null || { echo 'skipped: clang-format-14 is not installed'; exit 77; }
find apps pipelines genomics audio model kernels tests -name '*.h' -o -name '*.cc' | xargs clang-format-14 --dry-run -Werror
