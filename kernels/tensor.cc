// View, Tensor and Rows: shapes, ownership and the ragged batch.
#include "kernels/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <utility>

#include "kernels/error.h"
#include "kernels/ops.h"

namespace coil {

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
      return 2;
    case DType::f64:
      return 8;
    case DType::u8:
      return 1;
  }
  COIL_ASSERT(!"a dtype");
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f64:
      return "f64";
    case DType::i32:
      return "i32";
    case DType::u8:
      return "u8";
  }
  COIL_ASSERT(!"a dtype");
}

namespace {

View contiguous_view(void* data, DType dtype, Device device, std::span<const int64_t> shape) {
  check(!shape.empty() && shape.size() <= kMaxRank, "tensor: rank {}, expected 1 to {}",
        shape.size(), kMaxRank);
  View view{.data = data, .dtype = dtype, .device = device, .rank = static_cast<int>(shape.size())};
  int64_t count = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    check(shape[i] >= 0, "tensor: size {} of dimension {}, expected 0 or more", shape[i], i);
    view.size[i] = shape[i];
    view.stride[i] = count;
    check(shape[i] == 0 || count <= std::numeric_limits<int64_t>::max() / 16 / shape[i],
          "tensor: {} elements or more in one tensor", count);
    count *= std::max<int64_t>(shape[i], 1);
  }
  return view;
}

}  // namespace

int64_t View::count() const {
  if (rank == 0) return 0;
  int64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= size[i];
  return count;
}

bool View::contiguous() const {
  if (count() == 0) return true;
  int64_t expected = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (size[i] != 1 && stride[i] != expected) return false;
    expected *= size[i];
  }
  return true;
}

View View::slice(int64_t begin, int64_t length) const {
  COIL_ASSERT(rank >= 1 && begin >= 0 && length >= 0 && begin + length <= size[0]);
  View view = *this;
  view.data = static_cast<char*>(data) + begin * stride[0] * size_of(dtype);
  view.size[0] = length;
  return view;
}

View View::columns(int64_t begin, int64_t length) const {
  COIL_ASSERT(rank >= 1 && begin >= 0 && length >= 0 && begin + length <= size[rank - 1]);
  View view = *this;
  view.data = static_cast<char*>(data) + begin * stride[rank - 1] * size_of(dtype);
  view.size[rank - 1] = length;
  return view;
}

View View::reshape(std::initializer_list<int64_t> shape) const {
  COIL_ASSERT(contiguous());
  View view = contiguous_view(data, dtype, device, {shape.begin(), shape.size()});
  COIL_ASSERT(view.count() == count());
  return view;
}

std::string View::shape() const {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) text += fmt::format("{}{}", i == 0 ? "" : ", ", size[i]);
  return text + ") " + name_of(dtype);
}

View host_view(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  return contiguous_view(data, dtype, {}, {shape.begin(), shape.size()});
}

Tensor::Tensor(Backend& backend, DType dtype, std::initializer_list<int64_t> shape)
    : Tensor(backend, dtype, std::span<const int64_t>(shape.begin(), shape.size())) {}

Tensor::Tensor(Backend& backend, DType dtype, std::span<const int64_t> shape)
    : view_(contiguous_view(nullptr, dtype, backend.device(), shape)), backend_(&backend) {
  view_.data = backend.alloc(view_.count() * size_of(dtype));
}

Tensor::Tensor(Tensor&& other) noexcept
    : view_(std::exchange(other.view_, {})), backend_(std::exchange(other.backend_, nullptr)) {}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(view_, other.view_);
  std::swap(backend_, other.backend_);
  Tensor old = std::move(other);  // frees what this held now, not when `other` goes
  return *this;
}

Tensor::~Tensor() {
  if (view_.data) backend_->free(view_.data);
}

View brought(Backend& backend, const View& view, Tensor& kept) {
  if (!view || view.device == backend.device()) return view;
  kept = Tensor(backend, view.dtype, std::span<const int64_t>(view.size, view.rank));
  backend.copy(view, kept);
  return kept;
}

View on_host(Backend& backend, const View& view, std::vector<std::byte>& kept) {
  if (view.device.kind == Device::Kind::cpu) {
    backend.sync();
    return view;
  }
  kept.resize(view.count() * size_of(view.dtype));
  View host =
      contiguous_view(kept.data(), view.dtype, {}, {view.size, static_cast<size_t>(view.rank)});
  backend.copy(view, host);
  backend.sync();
  return host;
}

void* Backend::alloc_host(int64_t bytes) {
  void* const data = std::malloc(std::max<int64_t>(bytes, 1));
  if (!data)
    throw OutOfMemory(
        fmt::format("out of memory: {} of host memory asked for", binary_size(bytes)));
  return data;
}

void Backend::free_host(void* data) { std::free(data); }

Fetch::Fetch(Backend& backend, const View& from)
    : backend_(&backend),
      host_(contiguous_view(nullptr, from.dtype, {}, {from.size, static_cast<size_t>(from.rank)})) {
  host_.data = backend.alloc_host(host_.count() * size_of(host_.dtype));
  backend.copy(from, host_);
  mark_ = backend.mark();
}

const View& Fetch::wait() {
  backend_->wait(mark_);
  return host_;
}

Fetch::~Fetch() {
  try {
    wait();
  } catch (const Error&) {  // of the device: whoever needs the numbers is told
  }
  backend_->free_host(host_.data);
}

Rows::Rows(Backend& backend, std::vector<Piece> pieces)
    : backend_(&backend), pieces_(std::move(pieces)) {
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    check(piece.begin == total_, "rows: piece {} begins at row {}, expected {}", i, piece.begin,
          total_);
    check(piece.length >= 1, "rows: piece {} has length {}, expected 1 or more", i, piece.length);
    check(piece.position >= 0, "rows: piece {} has position {}, expected 0 or more", i,
          piece.position);
    check(piece.from >= -1 && piece.to >= -1,
          "rows: piece {} names slots {} and {}, expected -1 or more", i, piece.from, piece.to);
    total_ += piece.length;
    finished_ += piece.last;
    slots_ = std::max({slots_, piece.from + 1, piece.to + 1});
  }
  std::vector<int64_t> writer(slots_, -1);
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const int32_t to = pieces_[i].to;
    if (to < 0) continue;
    check(writer[to] < 0, "rows: pieces {} and {} both write slot {}", writer[to], i, to);
    writer[to] = i;
  }
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const int32_t from = pieces_[i].from;
    if (from < 0) continue;
    check(writer[from] < 0 || writer[from] == static_cast<int64_t>(i),
          "rows: piece {} reads slot {}, which piece {} writes", i, from, writer[from]);
  }
}

const Piece* Rows::device_pieces() const {
  if (!mirror_ && backend_->device().kind != Device::Kind::cpu) {
    const auto bytes = static_cast<int64_t>(pieces_.size() * sizeof(Piece));
    mirror_ = Tensor(*backend_, DType::u8, {bytes});
    backend_->copy(host_view(const_cast<Piece*>(pieces_.data()), DType::u8, {bytes}), mirror_);
  }
  return mirror_.as<Piece>();
}

const Rows::Tiles& Rows::tiles(int64_t length) const {
  for (const auto& kept : tiles_)
    if (kept->length == length) return *kept;
  const auto pieces = static_cast<int64_t>(pieces_.size());
  std::vector<int32_t> first(pieces);
  int64_t count = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    first[i] = static_cast<int32_t>(count);
    count += (pieces_[i].length + length - 1) / length;
  }
  check(count <= std::numeric_limits<int32_t>::max(), "rows: {} tiles of {} steps, expected < 2^31",
        count, length);
  Tiles& tiles = *tiles_.emplace_back(std::make_unique<Tiles>());
  tiles.length = length;
  tiles.count = count;
  tiles.first = Tensor(*backend_, DType::i32, {pieces});
  backend_->copy(host_view(first.data(), DType::i32, {pieces}), tiles.first);
  return tiles;
}

const Rows::Pooled& Rows::pooled(int64_t p) const {
  check(p >= 1, "rows: coarse steps of {} steps, expected 1 or more", p);
  for (const auto& kept : pooled_)
    if (kept->p == p) return *kept;
  std::vector<int64_t> first;
  std::vector<Piece> coarse;
  int64_t count = 0;
  for (const Piece& piece : pieces_) {
    first.push_back(count);
    const int64_t position = piece.position / p;
    const int64_t length = (piece.position + piece.length) / p - position;
    if (length == 0) continue;
    coarse.push_back({.begin = count,
                      .length = length,
                      .position = position,
                      .from = position == 0 ? -1 : piece.from,
                      .to = piece.to,
                      .last = piece.last});
    count += length;
  }
  check(count <= std::numeric_limits<int32_t>::max(), "rows: {} coarse steps, expected < 2^31",
        count);
  Tensor device_first;
  if (backend_->device().kind != Device::Kind::cpu) {
    std::vector<int32_t> narrow(first.begin(), first.end());
    const auto pieces = static_cast<int64_t>(narrow.size());
    device_first = Tensor(*backend_, DType::i32, {pieces});
    backend_->copy(host_view(narrow.data(), DType::i32, {pieces}), device_first);
  }
  pooled_.push_back(std::make_unique<Pooled>(Pooled{.p = p,
                                                    .rows = Rows(*backend_, std::move(coarse)),
                                                    .first = std::move(first),
                                                    .device_first = std::move(device_first)}));
  return *pooled_.back();
}

Rows Rows::equal(Backend& backend, int64_t count, int64_t length) {
  std::vector<Piece> pieces(count);
  for (int64_t i = 0; i < count; ++i) pieces[i] = {.begin = i * length, .length = length};
  return Rows(backend, std::move(pieces));
}

int64_t s4d_checkpoints(const Rows& rows) {
  int64_t count = 0;
  for (const Piece& piece : rows.pieces()) count += (piece.length + kS4dBlock - 1) / kS4dBlock;
  return count;
}

int64_t scan_checkpoints(const Backend& backend, const Rows& rows) {
  const int64_t block = scan_block(backend.device());
  int64_t count = 0;
  for (const Piece& piece : rows.pieces()) count += (piece.length + block - 1) / block;
  return count;
}

}  // namespace coil
