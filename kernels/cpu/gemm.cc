// Matrix products and sums of rows.
//
// f32 products go to oneDNN's sgemm. Beside its matmul primitives (brgemm), which have to be made
// for every shape (0.3 ms and 70 KB each, and ragged batches have many), sgemm was within 10 % on
// every product of a d 256 and a d 128 Mamba, forward and backward, at 512 to 8,192 rows: 210 to
// 340 GFLOP/s on two cores of a Xeon of 2023.
//
// bf16 weights with f32 activations: where the machine multiplies bf16 faster than f32 (AMX, or
// AMD's AVX-512 BF16), the activations are rounded to bf16 and oneDNN multiplies. Elsewhere (Intel
// without AMX: 165 GFLOP/s in bf16 beside 270 in f32) blocks of the weights are widened to f32. Up
// to kSkinnyRows rows take neither way: skinny.cc.
#include <omp.h>

#include <algorithm>
#include <array>
#include <bit>
#include <dnnl.hpp>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/skinny.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gemm.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

// total(c) += rows begin … end of x, blocks of rows first summed in block(c), which is zero before
// and after.
void sum_rows(const View& x, int64_t begin, int64_t end, float* block, float* total) {
  constexpr int64_t kRows = 512;
  const int64_t c = x.cols();
  for (int64_t from = begin; from < end; from += kRows) {
    for (int64_t t = from; t < std::min(end, from + kRows); ++t) {
      const float* row = x.row<float>(t);
      for_each(c, [=](auto tag, int64_t i) HWY_ATTR {
        hn::StoreU(hn::Add(hn::LoadU(tag, block + i), hn::LoadU(tag, row + i)), tag, block + i);
      });
    }
    add_and_clear(total, block, c);
  }
}

// to (k,n) = from (n,k) transposed, columns begin … end of `to`.
void transpose(const View& from, int64_t begin, int64_t end, const View& to) {
  constexpr int64_t kSide = 16;  // a cache line each way
  const int64_t k = from.cols();
  for (int64_t i = begin; i < end; i += kSide)
    for (int64_t p = 0; p < k; p += kSide)
      for (int64_t q = p; q < std::min(k, p + kSide); ++q) {
        float* const row = to.row<float>(q);
        for (int64_t j = i; j < std::min(end, i + kSide); ++j) row[j] = from.row<float>(j)[q];
      }
}

// y = beta * y + x
void scale_add(const float* x, float beta, int64_t count, float* y) {
  for_each(count, [=](auto tag, int64_t i) HWY_ATTR {
    auto sum = hn::LoadU(tag, x + i);
    if (beta != 0) sum = hn::MulAdd(hn::LoadU(tag, y + i), hn::Set(tag, beta), sum);
    hn::StoreU(sum, tag, y + i);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(sum_rows);
HWY_EXPORT(scale_add);
HWY_EXPORT(transpose);

namespace {

constexpr int64_t kSkinnyRows = 16;  // of a bf16 product, up to which skinny.cc is faster
// Of a product with transposed weights, from which turning them first pays: sgemm then runs at 98 %
// of the machine's fastest product instead of 78 to 95 % (Zen 4, d 128 and d 256).
constexpr int64_t kTransposeRows = 256;
constexpr int64_t kParallel = 32 << 10;        // elements from which threads pay
constexpr int64_t kParallelTerms = 128 << 10;  // multiplications from which they do
constexpr int64_t kWidened = 1 << 20;          // elements of weights widened at a time

// oneDNN takes the number of threads from OpenMP.
class ThreadCount {
 public:
  explicit ThreadCount(int threads) : before_(omp_get_max_threads()) {
    omp_set_num_threads(threads);
  }
  ~ThreadCount() { omp_set_num_threads(before_); }

 private:
  int before_;
};

bool multiplies_bf16_fast() {
  const auto isa = dnnl::get_effective_cpu_isa();
  if (isa == dnnl::cpu_isa::avx512_core_amx) return true;
#if HWY_ARCH_X86
  return isa == dnnl::cpu_isa::avx512_core_bf16 && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Rows of a view of one row may have any stride; libraries want at least the width.
int64_t leading(const View& view) { return std::max(view.stride[0], view.size[1]); }

}  // namespace

// oneDNN's bf16 products, by shape.
struct CpuBackend::Products {
  using Key = std::array<int64_t, 8>;
  struct Product {
    dnnl::memory a, b, c;
    dnnl::matmul matmul;
  };
  const bool fast_bf16 = multiplies_bf16_fast();
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<Key, Product> products;
  std::mutex mutex;

  // a (m,k) contiguous bf16.
  void run(const Gemm& op, View a);
};

void CpuBackend::Products::run(const Gemm& op, View a) {
  using dnnl::memory;
  constexpr size_t kMost = 256;  // shapes kept
  const int64_t m = op.c.rows(), n = op.c.cols(), k = a.cols();
  const int64_t beta = std::bit_cast<int32_t>(op.beta), alpha = std::bit_cast<int32_t>(op.alpha);
  const Key key{m, n, k, leading(op.b), leading(op.c), op.tb, beta, alpha};
  const std::lock_guard lock(mutex);
  if (products.size() >= kMost && !products.contains(key)) products.clear();
  auto found = products.find(key);
  if (found == products.end()) {
    const memory::dims b_strides =
        op.tb ? memory::dims{1, leading(op.b)} : memory::dims{leading(op.b), 1};
    const memory::desc a_desc({m, k}, memory::data_type::bf16, memory::dims{k, 1});
    const memory::desc b_desc({k, n}, memory::data_type::bf16, b_strides);
    const memory::desc c_desc({m, n}, memory::data_type::f32, memory::dims{leading(op.c), 1});
    dnnl::primitive_attr attributes;
    if (op.alpha != 1) attributes.set_output_scales(0, {op.alpha});
    dnnl::post_ops after;
    if (op.beta != 0) after.append_sum(op.beta);
    attributes.set_post_ops(after);
    const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(a_desc, b_desc, c_desc), attributes,
                                            engine);
    found =
        products
            .emplace(key, Product{memory(a_desc, engine, nullptr), memory(b_desc, engine, nullptr),
                                  memory(c_desc, engine, nullptr), dnnl::matmul(desc)})
            .first;
  }
  Product& product = found->second;
  product.a.set_data_handle(a.data);
  product.b.set_data_handle(op.b.data);
  product.c.set_data_handle(op.c.data);
  product.matmul.execute(
      stream,
      {{DNNL_ARG_SRC, product.a}, {DNNL_ARG_WEIGHTS, product.b}, {DNNL_ARG_DST, product.c}});
  stream.wait();
}

CpuBackend::CpuBackend(int threads, int64_t limit)
    : threads_(threads), products_(std::make_unique<Products>()), blocks_(cpu_memory(limit)) {}

CpuBackend::~CpuBackend() = default;

void CpuBackend::run(const Gemm& op) {
  expect_rank("gemm", "c", op.c, 2);
  expect_rank("gemm", "a", op.a, 2);
  const int64_t m = op.c.rows(), n = op.c.cols(), k = op.a.size[op.ta ? 0 : 1];
  const bool bf16 = op.b.dtype == DType::bf16;
  const auto shape = [](int64_t rows, int64_t cols, bool transposed) {
    return transposed ? std::pair(cols, rows) : std::pair(rows, cols);
  };
  const auto [a_rows, a_cols] = shape(m, k, op.ta);
  const auto [b_rows, b_cols] = shape(k, n, op.tb);
  expect("gemm", "a", op.a, DType::f32, {a_rows, a_cols});
  expect("gemm", "b", op.b, bf16 ? DType::bf16 : DType::f32, {b_rows, b_cols});
  expect("gemm", "c", op.c, DType::f32, {m, n});
  expect_if("gemm", "bias", op.bias, DType::f32, {n});
  if (m * n == 0) return;

  if (bf16 && op.tb && !op.ta && k > 0 && m <= kSkinnyRows) {
    const Tensor split(*this, DType::f32, {m, k});
    split_pairs(op.a.as<float>(), m, k, op.a.stride[0], split.as<float>());
    const SkinnyProduct product{.a = split.as<float>(),
                                .b = op.b.as<uint16_t>(),
                                .bias = op.bias.as<float>(),
                                .c = op.c.as<float>(),
                                .m = m,
                                .k = k,
                                .b_stride = op.b.stride[0],
                                .c_stride = op.c.stride[0],
                                .alpha = op.alpha,
                                .beta = op.beta};
    if (n * k < kParallel || threads_ == 1) return skinny_product(product, 0, n);
#pragma omp parallel num_threads(threads_)
    {
      const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
      const int64_t blocks = (n + 3) / 4;
      skinny_product(product, blocks * thread / count * 4,
                     std::min(n, blocks * (thread + 1) / count * 4));
    }
    return;
  }

  float beta = op.beta;
  if (op.bias || k == 0) {  // c = beta * c + bias first, then the product is added
    const auto add = &HWY_DYNAMIC_DISPATCH(scale_add);
    const std::vector<float> zero(op.bias ? 0 : n);
    const float* bias = op.bias ? op.bias.as<float>() : zero.data();
#pragma omp parallel for num_threads(threads_) schedule(static) if (m * n >= kParallel)
    for (int64_t i = 0; i < m; ++i) add(bias, beta, n, op.c.row<float>(i));
    beta = 1;
    if (k == 0) return;
  }
  const bool small = n * k < kParallel && m * n * k < kParallelTerms;
  const ThreadCount threads(small ? 1 : threads_);
  const auto multiply = [&](char tb, const View& b, const View& c) {
    const auto status =
        dnnl_sgemm(op.ta ? 'T' : 'N', tb, m, c.cols(), k, op.alpha, op.a.as<float>(), leading(op.a),
                   b.as<float>(), leading(b), beta, c.as<float>(), leading(c));
    check(status == dnnl_success, "gemm: oneDNN gave status {} for ({}, {}, {})",
          static_cast<int>(status), m, c.cols(), k);
  };
  if (!bf16 && op.tb && m >= kTransposeRows) {
    const Tensor turned(*this, DType::f32, {k, n});
    const auto transpose_columns = &HWY_DYNAMIC_DISPATCH(transpose);
    const int64_t blocks = (n + 15) / 16;
#pragma omp parallel for num_threads(threads_) schedule(static) if (n * k >= kParallel)
    for (int64_t i = 0; i < blocks; ++i)
      transpose_columns(op.b, 16 * i, std::min(n, 16 * i + 16), turned);
    return multiply('N', turned, op.c);
  }
  if (!bf16) return multiply(op.tb ? 'T' : 'N', op.b, op.c);
  if (products_->fast_bf16 && !op.ta) {
    const Tensor a(*this, DType::bf16, {m, k});
    copy(op.a, a);
    Gemm product = op;
    product.beta = beta;
    return products_->run(product, a);
  }
  const int64_t most = std::max<int64_t>(16, kWidened / k / 16 * 16);  // columns of c at a time
  const Tensor block(*this, DType::f32, {std::min(n, most) * k});
  for (int64_t begin = 0; begin < n; begin += most) {
    const int64_t width = std::min(most, n - begin);
    const View b = op.tb ? op.b.slice(begin, width) : op.b.columns(begin, width);
    const View wide = op.tb ? block.view().slice(0, width * k).reshape({width, k})
                            : block.view().slice(0, width * k).reshape({k, width});
#pragma omp parallel for num_threads(threads_) schedule(static) if (width * k >= kParallel)
    for (int64_t i = 0; i < b.rows(); ++i) widen(b.row<uint16_t>(i), b.cols(), wide.row<float>(i));
    multiply(op.tb ? 'T' : 'N', wide, op.c.columns(begin, width));
  }
}

void CpuBackend::run(const SumRows& op) {
  expect_rank("sum_rows", "x", op.x, 2);
  const int64_t t = op.x.rows(), c = op.x.cols();
  expect("sum_rows", "x", op.x, DType::f32, {t, c});
  expect("sum_rows", "out", op.out, DType::f32, {c});
  const auto sum = &HWY_DYNAMIC_DISPATCH(sum_rows);
  std::vector<float> sums(2 * c * threads_);  // of each thread: a block's and the blocks' so far
#pragma omp parallel num_threads(threads_) if (t * c >= kParallel)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    float* block = sums.data() + 2 * c * thread;
    sum(op.x, t * thread / count, t * (thread + 1) / count, block, block + c);
  }
  const auto add = &HWY_DYNAMIC_DISPATCH(scale_add);
  for (int64_t i = 0; i < threads_; ++i) add(sums.data() + 2 * c * i + c, 1, c, op.out.as<float>());
}

}  // namespace coil
#endif  // HWY_ONCE
