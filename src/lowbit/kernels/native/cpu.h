// What the native kernels share: instruction sets, argument records, entry points.
//
// Notation: x real value, q code, S scale, z zero point, k the index that a product sums over.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

namespace lowbit {

// What this process may use: what the processor has, lowered by ONEDNN_MAX_CPU_ISA as torch's own kernels are.
struct Machine {
    bool avx2, avx512, vnni, bf16, amx;
};
Machine detect();
// Found once; inline, since products ask in their loops.
inline const Machine& machine() {
    static const Machine m = detect();
    return m;
}
std::vector<std::string> instruction_sets();

// Pieces of work in a parallel region, which an exception, say for lack of memory, must not leave: the first is kept,
// the work that is left is passed over, and after the region it is thrown.
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

// Element types of tensors that cross from Python; the numbers are those of `lowbit.kernels.cpu`; 4 and 5 are int32 and
// int64.
enum class Type : int { f32 = 0, bf16 = 1, u8 = 2, s8 = 3 };

// ---- passes over memory: elementwise.cpp, compiled once for each instruction set ----

// A tensor in memory: outer x channels x inner, or with `channels_last` outer x inner x channels. Its elements are
// numbered as outer x channels x inner in either case: noise is a function of that number.
struct View {
    int64_t outer, channels, inner;
    bool channels_last;
};

// q = clamp(round(x / S) + z, low, high), or with `offset` q = round(clamp((x - o) / S, low, high)).
struct Grid {
    const float* scale;  // S, one or one for each channel
    const float* zero;   // z, or o with `offset`; as many; null for 0
    int64_t scales;
    float low, high;
    bool offset, stochastic;
    uint32_t key0, key1;  // of the noise
};

// How a grid is made of a range, as `lowbit.quantizer.grid_of` makes it.
struct Rule {
    bool symmetric;
    float levels, floor;   // the largest code, the smallest scale
    int64_t samples;       // 0: a grid for each channel; else one, of the mean of so many samples' extremes
    const float *lo, *hi;  // the range, in place of that of x; null for that of x
    bool stochastic;
    uint32_t key0, key1;  // of the noise
};

// A running range, as `lowbit.ranges.record_range` keeps it: lo, hi and the number of batches.
struct Running {
    float* range;
    float momentum;
    bool first;     // the first batch is taken whole
    bool training;  // record the batch and use its extremes; else use what was recorded
};

// What one batch says of each channel of codes that are rows by channels.
struct Statistics {
    int64_t* total;  // sums of codes
    float *mean, *sigma;
    int32_t *argmax, *argmin;  // first rows of the extremes, of each chunk
    const float* slopes;       // d sigma / d range, of each chunk
    int64_t chunks;            // 0: mean and sigma were given, and there is no more
};

// Codes of rows by channels: x = (q - zero) S.
struct CodeRows {
    const uint8_t* q;
    const float* scale;
    int zero;
};

struct Elementwise {
    // The smallest and largest value of each channel; nan where a nan is.
    void (*extremes)(const void* x, Type type, View view, float* lo, float* hi);
    // The extremes to use for x, the mean of those of `samples`.
    void (*observe)(const void* x, Type type, int64_t count, int64_t samples, const Running& running, float* lo,
                    float* hi);
    // Codes as `encode` writes them, their scales, and the zero point of the only scale; 0 where it is nan.
    int (*quantize)(const void* x, Type type, View view, const Rule& rule, int64_t taps, uint8_t* codes, float* scale);
    // The sum of each of `width` columns of a matrix.
    void (*sums)(const void* x, Type type, int64_t rows, int64_t width, float* to);
    // Of each channel: the sum of a's codes, and of a's times b's where there is a b.
    void (*code_sums)(const uint8_t* a, const uint8_t* b, int64_t rows, int64_t channels, int64_t* sum,
                      int64_t* product);
    // All that `Statistics` has, of codes in chunks of rows.
    void (*code_statistics)(const CodeRows& codes, int64_t channels, const int64_t* starts, const Statistics& to);
    // y = gamma (x - mean) / d + beta of the values x of codes, and d, which is sqrt(sigma^2 + eps) or sigma + eps;
    // with `rectify` no less than 0. With `narrowest` a sigma of 0 that the codes gave is that of ranges of one step.
    void (*normalize)(const CodeRows& codes, int64_t rows, int64_t channels, const Statistics& stats, float eps,
                      bool narrowest, bool inside, const float* gamma, const float* beta, bool rectify, float* d,
                      void* y, Type type);
    // g where such a y of type `y_type` is not 0 or less, 0 elsewhere.
    void (*rectify_backward)(const CodeRows& codes, int64_t rows, int64_t channels, const Statistics& stats,
                             const float* gamma, const float* beta, const float* d, Type y_type, const void* g,
                             Type type, void* to);
    // The gradients of gamma, beta and x, of the codes g of the output's gradient.
    void (*normalize_backward)(const CodeRows& g, const CodeRows& codes, int64_t rows, int64_t channels,
                               const Statistics& stats, bool inside, const float* gamma, const float* d,
                               float* grad_gamma, float* grad_beta, void* dx, Type type);
    // y = a q + b in each channel, with `relu` no less than 0.
    void (*affine)(const uint8_t* q, int64_t rows, int64_t channels, const float* a, const float* b, bool relu, void* y,
                   Type type);
    // Codes as bytes, in the order of x; with `taps` > 1 each record of channels x inner numbers, or of inner numbers
    // where the scale is one or there is one channel to a row, is transposed from (.., taps) to (taps, ..).
    void (*encode)(const void* x, Type type, View view, const Grid& grid, int64_t taps, uint8_t* codes);
    // The values of the codes, (q - z) S or q S + o, in the type and order of x.
    void (*fake_quantize)(const void* x, Type type, View view, const Grid& grid, void* y);
    // The nearest bfloat16 of each number.
    void (*round_bf16)(const float* x, int64_t count, float* y);
    // The uniform noise of numbers 0 to count - 1.
    void (*noise)(int64_t count, uint32_t key0, uint32_t key1, float* u);
};
const Elementwise& elementwise();

// ---- products: gemm.cpp and convolution.cpp ----

// Rows of numbers in memory. Without a window row r starts at `data + step(r) * stride` where `step` is r itself, or,
// with `fold`, (r % fold) * (rows / fold) + r / fold. With a window it is row r of the matrix that unfolds a
// convolution.
struct Window {
    int64_t position[4];  // batch, then three axes: what a row index counts
    int64_t size[3];      // of the side that the taps reach for
    int64_t kernel[3], stride[3], padding[3], dilation[3];
    bool transposed;   // positions are those of the convolution's input, and taps reach for its output
    int64_t channels;  // numbers at one place, of one group
};

struct Rows {
    const void* data;
    Type type;
    int64_t rows, width, stride, fold;
    const Window* window;
    int zero;  // the code of a real zero, also what lies outside the window
};

// C (m, n) = sum_k A B in the numbers' real values, with scales, bias and layout of the result.
struct Result {
    void* data;
    Type type;       // f32 or bf16
    int64_t stride;  // between rows
    int64_t taps;    // 1, or columns (tap, channel) are written as (channel, tap)
    const float* row_scale;
    int64_t row_scales;  // 1 or m
    const float* column_scale;
    int64_t column_scales;  // 1, n, or n / taps: one for each channel
    const float* bias;      // n numbers, or null
};

// A is m x k: with `a_along` its rows run along k, else they are k. B is k x n likewise: with `b_along` its rows are n.
struct Product {
    Rows a, b;
    bool a_along, b_along;
    int64_t m, n, k;
    Result result;
};
void multiply_codes(const Product& p);   // u8 or s8 by u8 or s8, summed in int32
void multiply_halves(const Product& p);  // f32, bf16 or codes, rounded to bf16, summed in float32
// The same of convolutions whose rows can be read where they lie; false, and nothing done, of all other products.
bool convolve_codes(const Product& p);
bool convolve_halves(const Product& p);

}  // namespace lowbit
