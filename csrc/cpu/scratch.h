// Memory of one operator call, aligned to a cache line and not initialised. No torch here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace floe::cpu {

class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes)
      : data_(::operator new(static_cast<std::size_t>(bytes + 64), kAlignment)) {}

  template <typename T = void>
  T* get() const {
    return static_cast<T*>(data_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Delete> data_;
};

}  // namespace floe::cpu
