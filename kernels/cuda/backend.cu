// Memory of the CUDA backend: where blocks come from (kernels/blocks.h), strided casting copies
// within the device and across, fill; host memory that the card reads and writes by itself.
#include <algorithm>
#include <cstring>

#include "kernels/cuda/device.cuh"

namespace coil {
namespace {

using cuda::bf16;
using cuda::check_call;

// Kept beyond the most in use: as much again, since cudaFree waits for the device and batches of
// many shapes need blocks of many sizes. Where the card is full they go back all the same.
constexpr double kKeptShare = 1;
constexpr int64_t kKeptAlways = 256 << 20;
constexpr int64_t kHalf = 4 << 20;  // bytes of staging: some steps of training
constexpr int kThreads = 256;

// A view as elements counted row-major: what a thread needs to find element i.
struct Layout {
  int64_t size[kMaxRank], stride[kMaxRank];  // leading ones are 1 and 0
  explicit Layout(const View& view) {
    for (int i = 0; i < kMaxRank; ++i) {
      const int from = i - (kMaxRank - view.rank);
      size[i] = from < 0 ? 1 : view.size[from];
      stride[i] = from < 0 ? 0 : view.stride[from];
    }
  }
  __device__ int64_t place(int64_t i) const {
    int64_t offset = 0;
    for (int k = kMaxRank - 1; k > 0; --k) {
      offset += i % size[k] * stride[k];
      i /= size[k];
    }
    return offset + i * stride[0];
  }
};

__device__ double to_number(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ double to_number(T x) {
  return static_cast<double>(x);
}

template <class To, class From>
__device__ To cast(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, bf16>) {
    return __float2bfloat16_rn(static_cast<float>(to_number(x)));
  } else if constexpr (std::is_same_v<From, bf16> && std::is_same_v<To, float>) {
    return __bfloat162float(x);
  } else if constexpr (std::is_integral_v<To>) {  // towards zero, clipped; NaN is 0
    const double value = to_number(x);
    if (value != value) return 0;
    const double low = std::is_same_v<To, uint8_t> ? 0. : -2147483648.;
    const double high = std::is_same_v<To, uint8_t> ? 255. : 2147483647.;
    return static_cast<To>(fmin(fmax(value, low), high));
  } else {
    return static_cast<To>(to_number(x));
  }
}

template <class To, class From>
__global__ void copy_kernel(const From* from, Layout from_layout, To* to, Layout to_layout,
                            int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += step)
    to[to_layout.place(i)] = cast<To>(from[from_layout.place(i)]);
}

template <class T>
__global__ void fill_kernel(T* to, Layout layout, int64_t count, double value) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += step)
    to[layout.place(i)] = cast<T>(value);
}

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f64:
      return f(double{});
    case DType::i32:
      return f(int32_t{});
    case DType::u8:
      return f(uint8_t{});
  }
}

int blocks_for(int64_t count, int processors) {
  return static_cast<int>(std::min<int64_t>(cuda::div_up(count, kThreads), 16 * processors));
}

// Page-locked, so that the card reads and writes it by itself. Where there is none, fewer rows at a
// time on the card would not help: no OutOfMemory.
void* host_memory(int64_t bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaHostAlloc(&data, bytes, cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw Error(fmt::format("out of host memory: {} ({} bytes) of page-locked memory asked for",
                            binary_size(bytes), bytes),
                "free memory of the machine, not of the GPU");
  }
  check_call(status, "host memory");
  return data;
}

View flat(const View& view) { return view.contiguous() ? view.reshape({view.count()}) : view; }

}  // namespace

int cuda_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::unique_ptr<Backend> make_cuda_backend(int index, int64_t limit) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess)
    throw Error(fmt::format("cuda:{}: {}", index, cudaGetErrorString(status)), "use --device cpu");
  if (index < 0 || index >= count)
    throw Error(fmt::format("cuda:{}: no such GPU, this machine has {}", index, count),
                "nvidia-smi lists them");
  return std::make_unique<CudaBackend>(index, limit);
}

Blocks::Device cuda_memory(int index, int64_t limit) {
  return {.name = fmt::format("cuda:{}", index),
          .alignment = kDeviceAlignment,
          .kept_share = kKeptShare,
          .kept_always = kKeptAlways,
          .limit = limit,
          .allocate = [](int64_t size) -> void* {
            void* data = nullptr;
            const cudaError_t status = cudaMalloc(&data, size);
            if (status == cudaErrorMemoryAllocation) {
              cudaGetLastError();
              return nullptr;
            }
            check_call(status, "cudaMalloc");
            return data;
          },
          .release = [](void* data) { cudaFree(data); },
          .look =
              [](Memory& memory) {
                size_t free = 0, total = 0;
                if (cudaMemGetInfo(&free, &total) != cudaSuccess) {
                  cudaGetLastError();
                  return;
                }
                memory.free = static_cast<int64_t>(free);
                memory.total = static_cast<int64_t>(total);
              }};
}

void CudaBackend::copy(View from, View to) {
  bool same = from.rank == to.rank;
  for (int i = 0; same && i < from.rank; ++i) same = from.size[i] == to.size[i];
  check(same, "copy: from is {}, to is {}: expected one shape", from.shape(), to.shape());
  const bool from_host = from.device.kind == Device::Kind::cpu;
  const bool to_host = to.device.kind == Device::Kind::cpu;
  check(!from_host || !to_host, "copy: both operands are host memory, expected one on {}", index_);
  check((from_host || from.device == device()) && (to_host || to.device == device()),
        "copy: an operand is on another GPU");
  const int64_t count = from.count();
  if (count == 0) return;
  const bool plain = from.dtype == to.dtype && from.contiguous() && to.contiguous();
  if (plain && from_host) return upload(from.data, to.data, count * size_of(to.dtype));
  if (plain) {  // to pageable memory this returns once the bytes are there
    check_call(
        cudaMemcpyAsync(to.data, from.data, count * size_of(to.dtype), cudaMemcpyDefault, stream_),
        "copy");
    return;
  }
  if (from_host) {  // packed, then across, then cast on the device
    check(from.contiguous(), "copy: strided host memory, expected contiguous");
    Tensor staged(*this, from.dtype, std::span<const int64_t>(from.size, from.rank));
    copy(from, staged);
    copy(staged, to);
    return;
  }
  if (to_host) {
    check(to.contiguous(), "copy: strided host memory, expected contiguous");
    Tensor staged(*this, to.dtype, std::span<const int64_t>(to.size, to.rank));
    copy(from, staged);
    copy(staged, to);
    return;
  }
  with_dtype(from.dtype, [&](auto from_value) {
    with_dtype(to.dtype, [&](auto to_value) {
      using From = decltype(from_value);
      using To = decltype(to_value);
      const bool both = from.contiguous() && to.contiguous();
      const Layout a(both ? flat(from) : from), b(both ? flat(to) : to);
      copy_kernel<To, From><<<blocks_for(count, processors_), kThreads, 0, stream_>>>(
          from.as<From>(), a, to.as<To>(), b, count);
    });
  });
  cuda::check_launch("copy");
}

void CudaBackend::fill(View x, double value) {
  check(x.device == device(), "fill: expected memory of cuda:{}", index_);
  const int64_t count = x.count();
  if (count == 0) return;
  if (value == 0 && x.contiguous()) {
    check_call(cudaMemsetAsync(x.data, 0, count * size_of(x.dtype), stream_), "fill");
    return;
  }
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    fill_kernel<T><<<blocks_for(count, processors_), kThreads, 0, stream_>>>(
        x.as<T>(), Layout(flat(x)), count, value);
  });
  cuda::check_launch("fill");
}

int CudaBackend::most_shared() {
  if (most_shared_ >= 0) return most_shared_;
  int major = 0, most = 0;
  check_call(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_), "cuda");
  check_call(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_),
             "cuda");
  return most_shared_ = major < 9 ? 0 : most;
}

void CudaBackend::sync() { check_call(cudaStreamSynchronize(stream_), "cuda"); }

// cudaMemcpyAsync from pageable memory may wait for all that the stream has to do; from staging it
// does not.
void CudaBackend::upload(const void* from, void* to, int64_t bytes) {
  if (!staging_.data) {
    staging_.data = static_cast<char*>(host_memory(2 * kHalf));
    for (cudaEvent_t& event : staging_.read)
      check_call(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cuda");
  }
  for (int64_t done = 0; done < bytes;) {
    if (staging_.filled == kHalf) {
      check_call(cudaEventRecord(staging_.read[staging_.half], stream_), "copy");
      staging_.half ^= 1;
      staging_.filled = 0;
      check_call(cudaEventSynchronize(staging_.read[staging_.half]), "copy");
    }
    const int64_t part = std::min(bytes - done, kHalf - staging_.filled);
    char* const place = staging_.data + staging_.half * kHalf + staging_.filled;
    std::memcpy(place, static_cast<const char*>(from) + done, part);
    check_call(cudaMemcpyAsync(static_cast<char*>(to) + done, place, part, cudaMemcpyHostToDevice,
                               stream_),
               "copy");
    done += part;
    staging_.filled = std::min(kHalf, cuda::div_up(staging_.filled + part, 64) * 64);
  }
}

void* CudaBackend::alloc_host(int64_t bytes) {
  const int64_t size = size_class(bytes, kDeviceAlignment);
  void* data = nullptr;
  if (const auto kept = host_kept_.find(size); kept != host_kept_.end() && !kept->second.empty()) {
    data = kept->second.back();
    kept->second.pop_back();
    return data;
  }
  data = host_memory(size);
  host_blocks_[data] = size;
  return data;
}

void CudaBackend::free_host(void* data) {
  if (data) host_kept_[host_blocks_.at(data)].push_back(data);
}

int64_t CudaBackend::mark() {
  cudaEvent_t& event = marks_[++marked_ % kMarks];
  if (!event) check_call(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cuda");
  check_call(cudaEventRecord(event, stream_), "cuda");
  return marked_;
}

// Where a later mark has taken its place, that one is waited for.
void CudaBackend::wait(int64_t mark) {
  check_call(cudaEventSynchronize(marks_[mark % kMarks]), "cuda");
}

void CudaBackend::release_host_memory() {
  for (const auto& [data, size] : host_blocks_) cudaFreeHost(data);
  if (staging_.data) cudaFreeHost(staging_.data);
  for (cudaEvent_t event : staging_.read)
    if (event) cudaEventDestroy(event);
  for (cudaEvent_t event : marks_)
    if (event) cudaEventDestroy(event);
}

}  // namespace coil
