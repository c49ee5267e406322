// What parallel regions need: pieces of a range, and a way for exceptions out of them.
//
// Everything is local to the file that includes it, since each is compiled for another instruction set.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace lowbit {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// An exception, for example of `new`, must not leave an OpenMP region. Guard runs each piece of work, keeps the first
// exception, skips the work that is left, and throws after the region.
class Guard {
  public:
    template <class Work>
    void operator()(const Work& work) noexcept {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            work();
        } catch (...) {
            if (!failed_.exchange(true)) kept_ = std::current_exception();
        }
    }
    void rethrow() const {
        if (kept_) std::rethrow_exception(kept_);
    }

  private:
    std::atomic<bool> failed_{false};
    std::exception_ptr kept_;
};

}  // namespace
}  // namespace lowbit
