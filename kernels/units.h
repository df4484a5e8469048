// What multiplies on a CPU with vectors of 512 or 256 bits, 32 rows by 32 columns at a time, and
// the order in which it takes its operands. Which of these kinds it is, the compiler knows:
//
//   matrix units (AMX)        products of bf16 with sums in fp32. An fp32 number is the sum of
//                             three in bf16, of 8 bits each, exactly: what rounding leaves is
//                             rounded again, twice. (Below 1e-33 the smallest parts would be
//                             denormal, which these units take for zero; above 3.38e38, infinity
//                             included, the sum is not a number.) Of the nine products of two such
//                             numbers the three of the smallest parts are below fp32's rounding,
//                             and left out; that is still faster than the vector units.
//   vectors that multiply     pairs of bf16 with sums in fp32, two products an instruction and
//   bf16 (AVX512-BF16)        lane; fp32 as such.
//   vectors (AVX-512, or      fp32. Of operands in bf16 the left one is widened when it is laid
//   AVX2 with FMA)            out, and the right one, a weight's, as it is loaded, two vectors at
//                             once: their numbers stand side by side in as many lanes.
#pragma once

#include <type_traits>

#include "vectors.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define BITFIT_TILES
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define BITFIT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif !defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__)
#define BITFIT_TILES
#endif

#ifdef BITFIT_TILES

namespace {

constexpr int SIDE = 32;                // rows and columns of a product, and its depth in a step
constexpr int64_t PART = SIDE * SIDE;   // numbers of a step
constexpr int64_t HALF = PART / 2;

inline int64_t whole(int64_t count) { return (count + SIDE - 1) / SIDE; }

// PLANES numbers of an operand make up one of type X, in as many planes. They are of type Number
// where the operand is made for one product, and of type Stored where it is a packed weight.
template <class X>
struct Layout {
#ifdef BITFIT_AMX
    using Number = bf16;
    using Stored = bf16;
    static constexpr int planes = sizeof(X) == sizeof(float) ? 3 : 1;
#elif defined(__AVX512BF16__)
    using Number = X;
    using Stored = X;
    static constexpr int planes = 1;
#else
    using Number = float;
    using Stored = X;
    static constexpr int planes = 1;
#endif
};

template <class X>
using Number = typename Layout<X>::Number;
template <class X>
using Stored = typename Layout<X>::Stored;
template <class X>
constexpr int PLANES = Layout<X>::planes;
// Bytes of one number of type X in an operand, and in a packed weight.
template <class X>
constexpr int64_t BYTES = PLANES<X> * sizeof(Number<X>);
template <class X>
constexpr int64_t STORED_BYTES = PLANES<X> * sizeof(Stored<X>);

// An operand's numbers; of three planes, the second and third are `plane` and twice that further
// on.
template <class P>
struct Operand {
    const P* data;
    int64_t plane;

    const P* operator[](int part) const { return data + part * plane; }
    Operand operator+(int64_t count) const { return {data + count, plane}; }
};

// The left operand of a product: 32 rows, or the first `count` of them.
template <class P>
struct Rows {
    Operand<P> all;
    int64_t stride, step, count;  // to the next row, to the next step
};

template <class P>
inline Rows<P> packed_rows(Operand<P> all, int64_t count = SIDE) {
    return {all, SIDE, PART, count};
}
template <class P>
inline Rows<P> plain_rows(Operand<P> all, int64_t stride, int64_t count = SIDE) {
    return {all, stride, SIDE, count};
}

// Memory of one thread, handed out piece by piece; one head of one sequence takes a few dozen.
struct Scratch {
    Buffer<char> all;
    int64_t used = 0;

    explicit Scratch(int64_t bytes) : all(bytes) {}

    template <class T>
    T* take(int64_t count) {
        T* here = reinterpret_cast<T*>(all.data + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return here;
    }
};

// ----------------------------------------------------------------------- numbers of an operand

#ifdef __AVX512BF16__
// What bf16 has of v.
inline Floats rounded(Floats v) {
    __m256i halves = bits_of<__m256i>(_mm512_cvtneps_pbh(bits_of<__m512>(v)));
    return bits_of<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
#endif

// A vector of numbers of type X, `plane` from part to part.
template <class X>
inline void split(Number<X>* to, [[maybe_unused]] int64_t plane, Floats v) {
#ifdef BITFIT_AMX
    for (int i = 1; i < PLANES<X>; i++, to += plane) {
        narrow(to, v);
        v -= rounded(v);
    }
#endif
    narrow(to, v);
}

// A vector of numbers that are there, or zeros.
template <class X, class From, class To>
inline void copy_parts(const From* from, To* to, int64_t plane) {
    if constexpr (std::is_same_v<From, To>) {
        From numbers[LANES] = {};
        if (from) std::memcpy(numbers, from, sizeof numbers);
        std::memcpy(to, numbers, sizeof numbers);
    } else {
        split<X>(to, plane, from ? widen(from) : Floats{});
    }
}

// ------------------------------------------------------------------------------ the right order

// LANES x LANES words, rows to columns; strides are in bytes.
#ifdef __AVX512F__
inline void transpose(const void* from, int64_t stride, void* to, int64_t to_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * stride);
    for (int i = 0; i < 16; i += 4) turn_fours(r + i);
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    char* out = static_cast<char*>(to);
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(out + i * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 8) * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}
#else
inline void transpose(const void* from, int64_t stride, void* to, int64_t to_stride) {
    __m256i r[8], t[8];
    for (int i = 0; i < 8; i++)
        r[i] = load_raw<__m256i>(static_cast<const char*>(from) + i * stride);
    for (int i = 0; i < 8; i += 4) turn_fours(r + i);
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    char* out = static_cast<char*>(to);
    for (int i = 0; i < 8; i++) std::memcpy(out + i * to_stride, &t[i], sizeof t[i]);
}
#endif

// A step of a right operand is 32 rows of 32 columns. In fp32 it is as one would expect. In bf16,
// where that is multiplied, the left 16 columns stand before the right ones, and the numbers of two
// rows next to each other, pair by pair; and where it is widened, those of two vectors of a row.
// Where number (k, j) of a step is:
template <class P>
constexpr int64_t place(int64_t k, int64_t j) {
    if (sizeof(P) == sizeof(float)) return k * SIDE + j;
#ifdef __AVX512BF16__
    return j / 16 * HALF + k / 2 * SIDE + j % 16 * 2 + k % 2;
#else
    return k * SIDE + j / (2 * LANES) * 2 * LANES + j % LANES * 2 + j / LANES % 2;
#endif
}

// A step that 32 rows are, and one whose columns 32 rows are; and 32 x 32 numbers, rows to columns.
inline void step_of_rows(const float* from, int64_t stride, float* to) {
    for (int k = 0; k < SIDE; k++)
        std::memcpy(to + k * SIDE, from + k * stride, SIDE * sizeof(float));
}
inline void turn(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int i = 0; i < SIDE; i += LANES)
        for (int k = 0; k < SIDE; k += LANES)
            transpose(from + i * stride + k, stride * sizeof(float), to + k * to_stride + i,
                      to_stride * sizeof(float));
}
inline void step_of_columns(const float* from, int64_t stride, float* to) {
    turn(from, stride, to, SIDE);
}

#ifdef __AVX512BF16__
inline void step_of_rows(const bf16* from, int64_t stride, bf16* to) {
    alignas(64) static constexpr uint16_t order[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i left = _mm512_load_si512(order), right = _mm512_load_si512(order + 32);
    for (int pair = 0; pair < 16; pair++, from += 2 * stride) {
        __m512i even = _mm512_loadu_si512(from), odd = _mm512_loadu_si512(from + stride);
        _mm512_storeu_si512(to + 32 * pair, _mm512_permutex2var_epi16(even, left, odd));
        _mm512_storeu_si512(to + HALF + 32 * pair, _mm512_permutex2var_epi16(even, right, odd));
    }
}
inline void turn(const bf16* from, int64_t stride, bf16* to, int64_t to_stride) {
    alignas(64) bf16 step[PART];
    step_of_rows(from, stride, step);
    for (int half = 0; half < 2; half++)
        transpose(step + half * HALF, 64, to + 16 * half * to_stride, to_stride * sizeof(bf16));
}
inline void step_of_columns(const bf16* from, int64_t stride, bf16* to) {
    for (int half = 0; half < 2; half++)
        transpose(from + 16 * half * stride, stride * sizeof(bf16), to + half * HALF, 64);
}
#endif

// ----------------------------------------------------------------------------------- products

#ifdef BITFIT_AMX

constexpr int64_t CACHE = 2048 << 10;  // what can be kept near, of a second-level cache

// Linux lets a process use tiles when it has asked to.
inline bool may_multiply() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    static const bool may = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
    return may;
}

// All eight tiles as large as they can be, 16 rows of 64 bytes, while this lives. Their shape is a
// constant: some compilers do not know that all of it is read, and drop what is written there.
struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr Shape SHAPE;

struct Units {
    Units() { _tile_loadconfig(&SHAPE); }
    Units(const Units&) = delete;
    ~Units() { _tile_release(); }
};

// out [32, 32] = rows x panel, over `steps` steps. The matrix unit works on its own, so other
// work is done in between: between(i) before step i.
template <class X, class Between>
inline void multiply(const Rows<bf16>& rows, Operand<bf16> panel, int64_t steps, float* out,
                     int64_t out_stride, const bf16*, Between between) {
    const int64_t bytes = rows.stride * sizeof(bf16), out_bytes = out_stride * sizeof(float);
    const auto left = [&](int part, int64_t i) {
        const bf16* a = rows.all[part] + i * rows.step;
        _tile_loadd(4, a, bytes);
        _tile_loadd(5, a + 16 * rows.stride, bytes);
    };
    const auto right = [&](int part, int64_t i) {
        const bf16* b = panel[part] + i * PART;
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + HALF, 64);
    };
    const auto product = [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    };
    // nor that a tile is read from memory: what was written there is to be there
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if constexpr (PLANES<X> == 3) {
        // the small products first, all of them, while sums are too small for their rounding to
        // matter; the next one always shares an operand with the one before
        for (int64_t i = 0; i < steps; i++) {
            between(i);
            left(2, i);
            right(0, i);
            product();
            left(1, i);
            product();
            right(1, i);
            product();
            left(0, i);
            product();
            right(2, i);
            product();
        }
    }
    for (int64_t i = 0; i < steps; i++) {
        if (PLANES<X> == 1) between(i);
        left(0, i);
        right(0, i);
        product();
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + 16, out_bytes);
    _tile_stored(2, out + 16 * out_stride, out_bytes);
    _tile_stored(3, out + 16 * out_stride + 16, out_bytes);
}

#else

constexpr int64_t CACHE = (64 << 10) * LANES;
// Rows of two vectors that there are registers for, 32 or 16, besides those that are multiplied.
constexpr int MOST_ROWS = LANES == 16 ? 11 : 6, ACROSS = 2;
constexpr int BAND = ACROSS * LANES;  // columns of such sums

inline bool may_multiply() { return true; }

struct Units {};

#ifdef __AVX512BF16__
// sum + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] in each lane, of two rows of b that stand in pairs.
inline Floats plus_products(Floats sum, const bf16* a, Floats pairs) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return bits_of<Floats>(_mm512_dpbf16_ps(bits_of<__m512>(sum),
                                            bits_of<__m512bh>(_mm512_set1_epi32(pair)),
                                            bits_of<__m512bh>(pairs)));
}
#endif
inline Floats plus_products(Floats sum, const float* a, Floats row) { return sum + all(*a) * row; }

// A band of what a right operand holds for a product with some of a row.
inline void load_band(const float* from, Floats* band) {
    for (int j = 0; j < ACROSS; j++) band[j] = load_raw<Floats>(from + j * LANES);
}
inline void load_band(const bf16* from, Floats* band) {
#ifdef __AVX512BF16__
    for (int j = 0; j < ACROSS; j++) band[j] = load_raw<Floats>(from + j * HALF);
#else
    const Words both = load_raw<Words>(from);
    band[0] = bits_of<Floats>(both << 16);
    band[1] = bits_of<Floats>(both & 0xffff0000u);
#endif
}

// out [count, BAND] = rows x a band of the panel, for as many rows as there are registers for
// sums. `lines` cache lines of each step of what is multiplied next are fetched meanwhile.
template <int count, class P, class W>
void multiply_some(const P* rows, int64_t stride, int64_t step, const W* panel, int64_t steps,
                   float* out, int64_t out_stride, const char* next, int64_t lines) {
    constexpr int at_once = sizeof(float) / sizeof(P);  // numbers of a row in a lane
    Floats sums[count][ACROSS];
    for (auto& of_row : sums)
        for (Floats& sum : of_row) sum = Floats{};
    for (int64_t i = 0; i < steps; i++, rows += step, panel += PART, next += PART * sizeof(W)) {
        for (int64_t line = 0; line < lines; line++) _mm_prefetch(next + 64 * line, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int k = 0; k < SIDE; k += at_once) {
            Floats b[ACROSS];
            load_band(panel + place<W>(k, 0), b);
#pragma GCC unroll 16
            for (int r = 0; r < count; r++)
                for (int j = 0; j < ACROSS; j++)
                    sums[r][j] = plus_products(sums[r][j], rows + r * stride + k, b[j]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < count; r++)
        for (int j = 0; j < ACROSS; j++) narrow(out + r * out_stride + j * LANES, sums[r][j]);
}

template <class P, class W>
using Some = void (*)(const P*, int64_t, int64_t, const W*, int64_t, float*, int64_t, const char*,
                      int64_t);

// That for any number of rows up to `most`.
template <int most, class P, class W>
inline Some<P, W> multiply_up_to(int64_t count) {
    if constexpr (most > 1)
        if (count < most) return multiply_up_to<most - 1, P, W>(count);
    return multiply_some<most, P, W>;
}

// out [count, 32] = rows x panel, over `steps` steps; behind the last row out stays as it is. The
// panel `next` is fetched meanwhile, unless it is null: what does not wait for memory waits for it.
// What else is to be done, between(i) for each step, is done first.
template <class X, class W, class Between>
inline void multiply(const Rows<Number<X>>& rows, Operand<W> panel, int64_t steps, float* out,
                     int64_t out_stride, const W* next, Between between) {
    for (int64_t i = 0; i < steps; i++) between(i);
    constexpr int64_t step_lines = PART * sizeof(W) / 64;
    // 32 rows in as even parts as there can be
    const int64_t across = SIDE / BAND, down = (rows.count + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t parts = across * down;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = rows.count * (part % down) / down;
        const int64_t last = rows.count * (part % down + 1) / down;
        const int64_t column = part / down * BAND;
        const int64_t line = step_lines * part / parts;
        const int64_t lines = next ? step_lines * (part + 1) / parts - line : 0;
        const auto some = multiply_up_to<MOST_ROWS, Number<X>, W>(last - first);
        some(rows.all.data + first * rows.stride, rows.stride, rows.step,
             panel.data + place<W>(0, column), steps, out + first * out_stride + column,
             out_stride, reinterpret_cast<const char*>(next ? next : panel.data) + 64 * line,
             lines);
    }
}

#endif

template <class X, class W>
inline void multiply(const Rows<Number<X>>& rows, Operand<W> panel, int64_t steps, float* out,
                     int64_t out_stride = SIDE) {
    const W* next = nullptr;
    multiply<X>(rows, panel, steps, out, out_stride, next, [](int64_t) {});
}

// Calls work(a vector of numbers, their row, their first column) for the real rows of a part.
template <class Work>
inline void each_vector(const float* part, int64_t row, int64_t count, int64_t column, Work work) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < SIDE; j += LANES)
            work(widen(part + i * SIDE + j), row + i, column + j);
}

}  // namespace
#endif
