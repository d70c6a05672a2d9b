#!/usr/bin/env bash
# Reads every #include of the source and fails on a wrong arrow:
#   apps -> pipelines -> genomics | audio | model -> kernels
# genomics and audio see of ours only kernels/error.h and model/batch.h; third-party headers stay in their home.
#   tests/test_layering.sh [SOURCE]
set -u
cd "${1:-$(dirname "$0")/..}" || exit 2
wrong=0

# forbid WHY FOLDERS PATTERN [EXCEPT]: no #include in FOLDERS may match PATTERN, unless it matches EXCEPT.
forbid() {
  local lines
  lines=$(grep -rnE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]($3)" $2 --include='*.h' --include='*.cc')
  [ -n "${4:-}" ] && lines=$(grep -vE "include[[:space:]]*[<\"]($4)[>\"]" <<<"$lines")
  [ -n "$lines" ] || return 0
  echo "$1:"; sed 's/^/  /' <<<"$lines"; wrong=1
}

all='apps pipelines genomics audio model kernels'
forbid 'kernels know no model and no data'      kernels   'apps/|pipelines/|genomics/|audio/|model/'
forbid 'model knows no DNA, no audio, no command' model  'apps/|pipelines/|genomics/|audio/|kernels/cpu/'
forbid 'genomics sees only error.h and batch.h' genomics  'apps/|pipelines/|audio/|kernels/|model/' 'kernels/error\.h|model/batch\.h'
forbid 'audio sees only error.h and batch.h'    audio     'apps/|pipelines/|genomics/|kernels/|model/' 'kernels/error\.h|model/batch\.h'
forbid 'pipelines know no command'              pipelines 'apps/|kernels/cpu/'
forbid 'apps leave the kernels to the model'    apps      'kernels/cpu/'
forbid 'includes are root-relative'             "$all"    '\.'

forbid 'htslib stays in genomics'               'apps pipelines audio model kernels'    'htslib/'
forbid 'libsndfile, libsamplerate stay in audio' 'apps pipelines genomics model kernels'        'sndfile|samplerate'
forbid 'HDF5 and libdeflate stay in pipelines'  'apps genomics audio model kernels'      'hdf5\.h|libdeflate'
forbid 'HDF5 stays in pipelines/hdf5_*'         "$(ls pipelines/*.h pipelines/*.cc | grep -v /hdf5_)" 'hdf5\.h|libdeflate'
forbid 'Boost stays in apps'                    'pipelines genomics audio model kernels' 'boost/'
forbid 'oneDNN and Highway stay in kernels/cpu' 'apps pipelines genomics audio model'         'dnnl|oneapi/|hwy/'
forbid 'oneDNN and Highway stay in kernels/cpu' "$(echo kernels/*.h kernels/*.cc)"      'dnnl|oneapi/|hwy/'
forbid 'OpenMP stays in kernels/cpu'            'apps pipelines genomics audio model'         'omp\.h'
forbid 'nlohmann-json has no place in kernels'  'kernels'                               'nlohmann/'
forbid 'GoogleTest stays in tests'              "$all"                                  'gtest/|gmock/'

[ $wrong = 0 ] && echo "layering: every #include points down"
exit $wrong
