// Memory that a thread keeps from one product to the next.

#include "workspace.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace lowbit {
namespace {

struct Block {
    void* p = nullptr;
    size_t bytes = 0;
    ~Block() { std::free(p); }
};

}  // namespace

void* workspace_bytes(Slot slot, size_t bytes) {
    static thread_local Block blocks[static_cast<size_t>(Slot::count)];
    Block& block = blocks[static_cast<size_t>(slot)];
#ifdef LOWBIT_SANITIZE
    // Fresh, of the very size, and full of nan or of large numbers: what is read before or beyond it shows.
    block.bytes = 0;
    bytes += 1;
#else
    bytes = (bytes + 64 + 63) / 64 * 64;
#endif
    if (block.bytes < bytes) {
        std::free(block.p);
        block.bytes = 0;
        if (posix_memalign(&block.p, 64, bytes)) {
            block.p = nullptr;
            throw std::bad_alloc();
        }
        block.bytes = bytes;
#ifdef LOWBIT_SANITIZE
        std::memset(block.p, 0xFF, bytes);
#endif
    }
    return block.p;
}

}  // namespace lowbit
