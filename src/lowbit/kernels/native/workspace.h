// Memory that a thread keeps from one product to the next: fresh memory of this size costs more than packing does.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

// What lives at the same time in one thread has slots of its own.
enum class Slot {
    packed_lhs,
    packed_rhs,
    accumulators,  // of all panels, or of a group of samples
    panel,         // accumulators of the panels of one task
    lhs_sums,
    rhs_sums,
    groups,   // 16 groups of depth-major rows
    numbers,  // rows in the packed type
    image,    // a padded image
    kernel_row,
    grouped_image,
    attention,       // of one thread
    attention_keys,  // encoded keys and values of a call
    count
};

// Bytes of a slot, of the calling thread, aligned to 64; what was in them is lost where they must grow.
void* workspace_bytes(Slot slot, size_t bytes);

template <class T>
T* workspace(Slot slot, int64_t count) {
    return static_cast<T*>(workspace_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace lowbit
