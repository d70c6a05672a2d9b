// View: borrowed memory with a shape. Tensor: memory owned through a Backend. Rows: a ragged batch.
//
// A batch is ragged and nothing is ever padded: activations are (t, channels), the pieces of
// several sequences one after another. Channels are last, the last stride is 1, other strides are
// free, so that a column range (z | x of one product) or a range of rows (a chunk of time) is a
// View and nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace coil {

class Backend;

enum class DType : uint8_t { f32, bf16, f64, i32, u8 };
int64_t size_of(DType dtype);      // bytes per element
const char* name_of(DType dtype);  // "f32", …

struct Device {
  enum class Kind : uint8_t { cpu, cuda } kind = Kind::cpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

constexpr int kMaxRank = 4;

// Borrowed, trivially copyable. `data` null means "not given" wherever an operand is optional.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device;
  int rank = 0;
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements; the last one is 1

  explicit operator bool() const { return data != nullptr; }
  int64_t rows() const { return size[0]; }
  int64_t cols() const { return size[rank - 1]; }
  int64_t count() const;  // number of elements
  bool contiguous() const;
  View slice(int64_t begin, int64_t length) const;           // along the first dimension
  View columns(int64_t begin, int64_t length) const;         // along the last dimension
  View reshape(std::initializer_list<int64_t> shape) const;  // contiguous views only
  std::string shape() const;                                 // "(12, 512) f32", for messages

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  template <class T>
  T* row(int64_t i) const {  // rank 1 or more; 64-bit throughout
    return static_cast<T*>(data) + i * stride[0];
  }
};

// A host array as a View, rank 1 or as shaped; for targets, token ids and tests. Not owned.
View host_view(void* data, DType dtype, std::initializer_list<int64_t> shape);

// Owned, move-only, contiguous, 64-byte aligned, memory from and back to its Backend. The contents
// of a new Tensor are not set.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Backend& backend, DType dtype, std::initializer_list<int64_t> shape);
  Tensor(Backend& backend, DType dtype, std::span<const int64_t> shape);
  Tensor(Tensor&& other) noexcept;
  Tensor& operator=(Tensor&& other) noexcept;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor();

  const View& view() const { return view_; }
  operator const View&() const { return view_; }
  explicit operator bool() const { return view_.data != nullptr; }
  int64_t count() const { return view_.count(); }
  template <class T>
  T* as() const {
    return view_.as<T>();
  }
  template <class T>
  std::span<T> span() const {  // host tensors only
    return {view_.as<T>(), static_cast<size_t>(view_.count())};
  }

 private:
  View view_;
  Backend* backend_ = nullptr;
};

// `view` in the backend's memory: itself where it is there, else a copy that `kept` holds.
View brought(Backend& backend, const View& view, Tensor& kept);
// `view` in host memory, the same way; waits for the backend.
View on_host(Backend& backend, const View& view, std::vector<std::byte>& kept);

// A few numbers on their way to the host: the copy is asked for when this is made and waited for by
// wait(), while the device may be busy with what was asked for later.
class Fetch {
 public:
  Fetch(Backend& backend, const View& from);  // from: contiguous
  Fetch(const Fetch&) = delete;
  Fetch& operator=(const Fetch&) = delete;
  ~Fetch();
  const View& wait();  // in host memory, as long as this lives

 private:
  Backend* backend_;
  View host_;
  int64_t mark_;
};

// One piece of a sequence in a ragged batch.
struct Piece {
  int64_t begin = 0;     // its first row in the batch
  int64_t length = 0;    // rows; at least 1
  int64_t position = 0;  // of its first step in its sequence
  int32_t from = -1;     // state slot read; -1: start from zero
  int32_t to = -1;       // state slot written; -1: discard. from != to forks
  bool last = true;      // the sequence ends with this piece
  bool operator==(const Piece&) const = default;
};

// The pieces of one ragged batch, on the host and, for a device, mirrored there. Pieces cover the
// rows 0 … t-1 in order without gaps. Throws where they do not, where two pieces write one slot, or
// where one piece reads a slot that another writes (the order within a batch is not defined).
class Rows {
 public:
  Rows(Backend& backend, std::vector<Piece> pieces);
  static Rows equal(Backend& backend, int64_t count, int64_t length);  // from zero, state discarded

  std::span<const Piece> pieces() const { return pieces_; }
  int64_t total() const { return total_; }        // t
  int64_t finished() const { return finished_; }  // pieces with `last`
  int32_t slots() const { return slots_; }        // highest slot named, plus one

  // For kernels of a device that is no CPU. The pieces in its memory, copied when first asked for
  // (null on a CPU); and every piece cut into tiles of `length` steps (the last one shorter), tile
  // by tile in order of pieces.
  const Piece* device_pieces() const;
  struct Tiles {
    int64_t length = 0, count = 0;  // steps of a tile; tiles in all
    Tensor first;                   // (pieces) i32 in device memory: first tile of each piece
  };
  const Tiles& tiles(int64_t length) const;  // made once, then kept

  // The coarse steps, of p steps each from a multiple of p on, that end within the pieces: another
  // batch, of the pieces that finish one or more, in the same slots. A sequence's first starts from
  // zero whatever `from` says.
  struct Pooled;
  const Pooled& pooled(int64_t p) const;  // made once, then kept

 private:
  Backend* backend_;
  std::vector<Piece> pieces_;
  int64_t total_ = 0, finished_ = 0;
  int32_t slots_ = 0;
  mutable Tensor mirror_;
  mutable std::vector<std::unique_ptr<Tiles>> tiles_;
  mutable std::vector<std::unique_ptr<Pooled>> pooled_;
};

struct Rows::Pooled {
  int64_t p = 0;
  Rows rows;                   // of coarse steps
  std::vector<int64_t> first;  // the first coarse row of each piece, also of those that finish none
  Tensor device_first;         // (pieces) i32, the same in the memory of a device that is no CPU
};

}  // namespace coil
