// Matrix products by cuBLASLt, f32 or bf16 operands, f32 sums.
//
// cuBLASLt is some 500 MB and needed on a GPU only, so it is opened when the first product comes.
// Its work space is taken before, so that what is free then is what there will be.
// Row-major c = op(a) op(b) is column-major c' = op(b)' op(a)'. Algorithms are asked for once per
// shape, types and alignment; split-k sums of a fixed order only, so that bits repeat. What
// cuBLASLt has no algorithm for (bf16 views at odd offsets, say) a plain tiled kernel computes.
//
// A bias is added by the product itself where c is f32 and written anew. cuBLASLt wants a bias of
// the type of c, and ours are f32 always: into c of bf16 a kernel writes it first, rounded as it
// would have to be for cuBLASLt, and the product is added to that.
#include <cublasLt.h>
#include <dlfcn.h>

#include <array>
#include <bit>

#include "kernels/cuda/device.cuh"

namespace coil {
namespace {

using cuda::bf16;

constexpr int kTile = 16;
constexpr int kThreads = 256;

// The entries of cuBLASLt that are used, found at run time.
struct Library {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtMatmulDescInit_internal) desc_init;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutInit_internal) layout_init;
  decltype(&cublasLtMatmulPreferenceInit_internal) preference_init;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmul) matmul;

  Library() {
    void* handle = nullptr;
    for (const char* name : {"libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13"})
      if (!handle) handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
      throw Error("cannot open libcublasLt.so.13, expected the CUDA 13 libraries",
                  "install libcublas-13-0, or name its folder in LD_LIBRARY_PATH; --device cpu "
                  "needs neither");
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      check(function != nullptr, "libcublasLt.so.13 has no '{}'", name);
    };
    find(create, "cublasLtCreate");
    find(destroy, "cublasLtDestroy");
    find(desc_init, "cublasLtMatmulDescInit_internal");
    find(desc_set, "cublasLtMatmulDescSetAttribute");
    find(layout_init, "cublasLtMatrixLayoutInit_internal");
    find(preference_init, "cublasLtMatmulPreferenceInit_internal");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(matmul, "cublasLtMatmul");
  }
};

void check_blas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) [[likely]]
    return;
  cudaGetLastError();                        // as in check_call()
  if (status == CUBLAS_STATUS_ALLOC_FAILED)  // its kernels are loaded when first used
    throw OutOfMemory(
        fmt::format("gemm: {}: out of memory on the GPU, {}", what, cuda::free_memory()));
  fail("gemm: {} gave cuBLAS status {}", what, static_cast<int>(status));
}

// c = beta c + bias, a row at a time.
template <class T>
__global__ void bias_kernel(const float* bias, T* c, int64_t stride, int64_t n, int64_t count,
                            float beta) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += step) {
    T* const to = c + i / n * stride + i % n;
    const float add = bias ? bias[i % n] : 0;
    *to = cuda::from_float<T>(beta == 0 ? add : beta * cuda::to_float(*to) + add);
  }
}

// Element (i, p) of op(a) stands at a[i * a_row + p * a_col], (p, j) of op(b) likewise.
template <class In, class Out>
__global__ void product_kernel(const In* a, int64_t a_row, int64_t a_col, const In* b,
                               int64_t b_row, int64_t b_col, Out* c, int64_t c_stride, int64_t m,
                               int64_t n, int64_t k, float alpha, float beta) {
  __shared__ float a_tile[kTile][kTile + 1], b_tile[kTile][kTile + 1];
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kTile) + y;
  const int64_t column = blockIdx.y * static_cast<int64_t>(kTile) + x;
  float sum = 0;
  for (int64_t p = 0; p < k; p += kTile) {
    a_tile[y][x] = row < m && p + x < k ? cuda::to_float(a[row * a_row + (p + x) * a_col]) : 0;
    b_tile[y][x] =
        p + y < k && column < n ? cuda::to_float(b[(p + y) * b_row + column * b_col]) : 0;
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kTile; ++q) sum += a_tile[y][q] * b_tile[q][x];
    __syncthreads();
  }
  if (row >= m || column >= n) return;
  Out* const to = c + row * c_stride + column;
  *to = cuda::from_float<Out>(alpha * sum + (beta == 0 ? 0 : beta * cuda::to_float(*to)));
}

cudaDataType_t type_of(const View& view) {
  return view.dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
}

// Rows of a view of one row may have any stride; libraries want at least the width.
int64_t leading(const View& view) { return std::max(view.stride[0], view.size[1]); }

uint32_t alignment(const View& view) {  // 256 at most
  const auto bits = reinterpret_cast<uintptr_t>(view.data) | 256;
  return static_cast<uint32_t>(bits & -bits);
}

}  // namespace

struct CudaBackend::Products {
  // m n k, leading dimensions; types, transposes and alignments.
  using Key = std::array<int64_t, 7>;
  struct Algorithm {
    bool found = false;
    cublasLtMatmulAlgo_t algorithm;
  };
  const Library library;
  cublasLtHandle_t handle = nullptr;
  std::map<Key, Algorithm> algorithms;

  Products() { check_blas(library.create(&handle), "cublasLtCreate"); }
  ~Products() {
    if (handle) library.destroy(handle);
  }

  // c = alpha op(a) op(b) + beta c, plus op.bias where with_bias. False: cuBLASLt has nothing for
  // it.
  bool run(const Gemm& op, float beta, bool with_bias, int64_t m, int64_t n, int64_t k,
           void* workspace, cudaStream_t stream);
};

bool CudaBackend::Products::run(const Gemm& op, float beta, bool with_bias, int64_t m, int64_t n,
                                int64_t k, void* workspace, cudaStream_t stream) {
  cublasLtMatmulDescOpaque_t desc;
  cublasLtMatrixLayoutOpaque_t a, b, c;
  check_blas(library.desc_init(&desc, sizeof desc, CUBLAS_COMPUTE_32F, CUDA_R_32F),
             "a description");
  const cublasOperation_t ta = op.tb ? CUBLAS_OP_T : CUBLAS_OP_N;  // a and b change places
  const cublasOperation_t tb = op.ta ? CUBLAS_OP_T : CUBLAS_OP_N;
  check_blas(library.desc_set(&desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta), "a transpose");
  check_blas(library.desc_set(&desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb), "a transpose");
  if (with_bias) {  // along the rows of column-major c', not scaled by alpha
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    const void* const bias = op.bias.data;
    check_blas(library.desc_set(&desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue),
               "a bias");
    check_blas(library.desc_set(&desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias),
               "a bias");
  }
  const auto layout = [&](cublasLtMatrixLayoutOpaque_t& to, const View& view) {
    check_blas(library.layout_init(&to, sizeof to, type_of(view), view.size[1], view.size[0],
                                   leading(view)),
               "a layout");
  };
  layout(a, op.b);
  layout(b, op.a);
  layout(c, op.c);
  const uint32_t alignments[] = {alignment(op.b), alignment(op.a), alignment(op.c)};
  const int64_t flags = op.ta | op.tb << 1 | (op.b.dtype == DType::bf16) << 2 |
                        (op.c.dtype == DType::bf16) << 3 | (beta != 0) << 4 | alignments[0] << 5 |
                        alignments[1] << 15 | static_cast<int64_t>(alignments[2]) << 25 |
                        (with_bias ? static_cast<int64_t>(alignment(op.bias)) << 35 : 0);
  const Key key{m, n, k, leading(op.a), leading(op.b), leading(op.c), flags};
  constexpr size_t kMost = 4096;  // shapes kept
  if (algorithms.size() >= kMost && !algorithms.contains(key)) algorithms.clear();
  const auto [place, is_new] = algorithms.try_emplace(key);
  if (is_new) {
    cublasLtMatmulPreferenceOpaque_t preference;
    check_blas(library.preference_init(&preference, sizeof preference), "a preference");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, auto value) {
      check_blas(library.preference_set(&preference, what, &value, sizeof value), "a preference");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kDeviceWorkspace));
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments[1]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments[2]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments[2]);
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    const auto status =
        library.heuristic(handle, &desc, &a, &b, &c, &c, &preference, 1, &result, &found);
    place->second.found = status == CUBLAS_STATUS_SUCCESS && found > 0;
    if (place->second.found) place->second.algorithm = result.algo;
  }
  if (!place->second.found) return false;
  check_blas(
      library.matmul(handle, &desc, &op.alpha, op.b.data, &a, op.a.data, &b, &beta, op.c.data, &c,
                     op.c.data, &c, &place->second.algorithm, workspace, kDeviceWorkspace, stream),
      "a product");
  return true;
}

CudaBackend::CudaBackend(int index, int64_t limit)
    : index_(index),
      blocks_(cuda_memory(index, limit)),
      products_(nullptr, [](Products* products) { delete products; }) {
  cuda::check_call(cudaSetDevice(index), "cuda");
  cuda::check_call(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, index),
                   "cuda");
  cuda::check_call(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cuda");
  try {
    workspace_ = alloc(kDeviceWorkspace);
  } catch (...) {
    cudaStreamDestroy(stream_);
    throw;
  }
}

CudaBackend::~CudaBackend() {
  cudaStreamSynchronize(stream_);
  release_host_memory();
  cudaStreamDestroy(stream_);
}

void CudaBackend::run(const Gemm& op) {
  expect_rank("gemm", "c", op.c, 2);
  expect_rank("gemm", "a", op.a, 2);
  expect_rank("gemm", "b", op.b, 2);
  const int64_t m = op.c.rows(), n = op.c.cols(), k = op.a.size[op.ta ? 0 : 1];
  const auto expect_matrix = [&](const char* name, const View& view, int64_t rows, int64_t cols,
                                 bool transposed) {
    check(view.dtype == DType::f32 || view.dtype == DType::bf16,
          "gemm: {} is {}, expected f32 or bf16", name, view.shape());
    expect("gemm", name, view, view.dtype,
           transposed ? std::initializer_list<int64_t>{cols, rows}
                      : std::initializer_list<int64_t>{rows, cols});
    cuda::expect_here("gemm", name, view, device());
  };
  expect_matrix("a", op.a, m, k, op.ta);
  expect_matrix("b", op.b, k, n, op.tb);
  expect_matrix("c", op.c, m, n, false);
  check(op.a.dtype == op.b.dtype, "gemm: a is {}, b is {}: expected one type", op.a.shape(),
        op.b.shape());
  check(op.c.dtype == DType::f32 || op.b.dtype == DType::bf16,
        "gemm: c is {}, expected f32 beside f32 operands", op.c.shape());
  expect_if("gemm", "bias", op.bias, DType::f32, {n});
  cuda::expect_here("gemm", "bias", op.bias, device());
  if (m * n == 0) return;

  if (!products_) {  // of one thread, as all ops of a backend; it belongs to the current card
    cuda::check_call(cudaSetDevice(index_), "cuda");
    products_.reset(new Products);
  }
  const auto product = [&](float beta, bool with_bias) {
    return products_->run(op, beta, with_bias, m, n, k, workspace_, stream_);
  };
  float beta = op.beta;
  if (op.bias && op.c.dtype == DType::f32 && beta == 0 && k > 0 && product(beta, true)) return;
  if (op.bias || k == 0) {  // c = beta * c + bias first, then the product is added
    const int64_t blocks = std::min<int64_t>(cuda::div_up(m * n, kThreads), 16 * processors_);
    cuda::with_type("gemm", op.c, [&](auto type) {
      using T = decltype(type);
      bias_kernel<T><<<blocks, kThreads, 0, stream_>>>(op.bias.as<float>(), op.c.as<T>(),
                                                       op.c.stride[0], n, m * n, beta);
    });
    cuda::check_launch("gemm");
    beta = 1;
    if (k == 0) return;
  }
  if (product(beta, false)) return;
  const dim3 grid(static_cast<unsigned>(cuda::div_up(m, kTile)),
                  static_cast<unsigned>(cuda::div_up(n, kTile)));
  cuda::with_type("gemm", op.b, [&](auto in) {
    cuda::with_type("gemm", op.c, [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      const int64_t lda = op.a.stride[0], ldb = op.b.stride[0];
      product_kernel<In, Out><<<grid, dim3(kTile, kTile), 0, stream_>>>(
          op.a.as<In>(), op.ta ? 1 : lda, op.ta ? lda : 1, op.b.as<In>(), op.tb ? 1 : ldb,
          op.tb ? ldb : 1, op.c.as<Out>(), op.c.stride[0], m, n, k, op.alpha, beta);
    });
  });
  cuda::check_launch("gemm");
}

}  // namespace coil
