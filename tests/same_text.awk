# awk -f tests/same_text.awk EXPECTED FOUND: exit 0 if the files agree line by line, where numbers with four or more
# decimals may differ by 3e-5: processors with other vector widths round the last digit otherwise.
function split_line(line, words, numbers,   n, m) {
  n = m = 0
  while (match(line, /[0-9]+\.[0-9][0-9][0-9][0-9]+/)) {
    words[++n] = substr(line, 1, RSTART - 1); numbers[++m] = substr(line, RSTART, RLENGTH)
    line = substr(line, RSTART + RLENGTH)
  }
  words[++n] = line
  return n
}
FNR == NR { expected[++count] = $0; next }
{
  if (FNR > count) { bad = 1; exit }
  if ($0 == expected[FNR]) next
  n = split_line($0, w, x); m = split_line(expected[FNR], v, y)
  if (n != m) { bad = 1; exit }
  for (i = 1; i <= n; i++) {
    d = i < n ? x[i] - y[i] : 0
    if (w[i] != v[i] || d > 3e-5 || d < -3e-5) { bad = 1; exit }
  }
}
END { exit bad || FNR != count }
