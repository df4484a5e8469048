// What the kernels for CPUs are made of: vectors of columns in fp32, exact sums over tokens,
// dropout's masks, activations, softmax.
//
// Rows are worked on in fp32, as many columns at a time as a register holds and one row after the
// other, in buffers that a near cache holds. These columns are one of the compiler's own
// vectors; of wider ones than the CPU's registers it makes slow code. Sums over tokens are taken
// in blocks of rows and then over blocks, both in a fixed order, so that the result depends
// neither on the number of threads nor on their luck.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using std::int64_t;

constexpr int64_t BLOCK = 32;  // rows of a partial sum
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Longs __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct bf16 {
    uint16_t bits;
};

template <class To, class From>
inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V, class T>
inline V load_raw(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats widen(const float* from) { return load_raw<Floats>(from); }
inline Floats widen(const bf16* from) {
#ifdef __AVX512F__
    __m256i halves = load_raw<__m256i>(from);
    return bits_of<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
    __m128i halves = load_raw<__m128i>(from);
    return bits_of<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
    return bits_of<Floats>(__builtin_convertvector(load_raw<Halves>(from), Words) << 16);
#endif
}
inline Floats widen(const uint8_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return bits_of<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(
        reinterpret_cast<const __m128i*>(from)))));
#else
    return __builtin_convertvector(load_raw<Bytes>(from), Floats);
#endif
}

inline void narrow(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
inline void narrow(bf16* to, Floats v) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh(bits_of<__m512>(v));
#else
    // to the nearest, ties to even; not-a-number stays so, and does not carry into the sign
    const Words bits = bits_of<Words>(v), up = bits + 0x7fff + ((bits >> 16) & 1);
    const Words safe = v == v ? up : bits | 0x400000;
    const Halves rounded = __builtin_convertvector(safe >> 16, Halves);
#endif
    std::memcpy(to, &rounded, sizeof rounded);
}
inline void narrow(uint8_t* to, Floats v) {
    const Ints cut = __builtin_convertvector(v, Ints);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i words = bits_of<__m256i>(cut);
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
#else
    const Bytes bytes = __builtin_convertvector(cut, Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
#endif
}

inline Floats all(float value) { return value - Floats{}; }

// 0, 1, 2, ...
inline Ints lanes() {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

// Both reduce lanes that are half a vector apart, then a quarter, and so on.
inline float sum_of(Floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(bits_of<__m512>(v));
#else
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
#endif
}

inline float most_of(Floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(bits_of<__m512>(v));
#else
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] = std::max(v[i], v[i + width]);
    return v[0];
#endif
}

// All columns of a step, or the first few where a row ends.
struct Whole {
    template <class X>
    Floats load(const X* from) const {
        return widen(from);
    }
    template <class X>
    void store(X* to, Floats v) const {
        narrow(to, v);
    }
    Floats only(Floats v, float) const { return v; }
};

struct Part {
    int64_t count;

    template <class X>
    Floats load(const X* from) const {
        X lanes[LANES] = {};
        std::memcpy(lanes, from, count * sizeof(X));
        return widen(lanes);
    }
    template <class X>
    void store(X* to, Floats v) const {
        X lanes[LANES];
        narrow(lanes, v);
        std::memcpy(to, lanes, count * sizeof(X));
    }
    Floats only(Floats v, float other) const {
        return lanes() < int32_t(count) ? v : all(other);
    }
};

// The last columns of a row that goes on behind them.
struct Padded : Part {
    template <class X>
    Floats load(const X* from) const {
        return widen(from);
    }
    template <class X>
    void store(X* to, Floats v) const {
        narrow(to, only(v, 0.0f));
    }
};

// Calls work(first column, Whole or Last) over a row. Buffers have room for whole steps.
template <class Last = Part, class Work>
inline void sweep(int64_t columns, Work work) {
    int64_t j = 0;
    for (; j + LANES <= columns; j += LANES) work(j, Whole{});
    if (j < columns) work(j, Last{columns - j});
}

// Memory that begins where a cache line does; otherwise every other access would touch two.
template <class T>
struct Buffer {
    T* data;

    explicit Buffer(int64_t count)
        : data(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)))) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
};

inline int64_t room(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

// ------------------------------------------------------------------------------- exponentials

// exp for arguments up to 88, relative error 1e-7. Below -80 it is 0: products of smaller numbers
// would be denormal, which take CPUs a hundred times as long.
inline Floats exponential(Floats x) {
    const Ints vanishes = x < -80.0f;
    x = vanishes ? all(0.0f) : x;
    Floats k = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    Floats f = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    p = p * bits_of<Floats>((__builtin_convertvector(k, Ints) + 127) << 23);
    return vanishes ? all(0.0f) : p;
}

inline Floats magnitude(Floats v) { return bits_of<Floats>(bits_of<Words>(v) & 0x7fffffffu); }

// 1 / v to the last bit or two, for v from 1 on. A division takes as long as a dozen products.
inline Floats inverse(Floats v) {
#ifdef __AVX512F__
    Floats r = bits_of<Floats>(_mm512_rcp14_ps(bits_of<__m512>(v)));
    return r * (2.0f - v * r);
#else
    return 1.0f / v;
#endif
}

struct Gelu {
    // the normal distribution's tail is exp(-z^2 / 2) by a polynomial of t - 1/2; fitted, it is
    // 6e-9 off, and unlike one of t has no large terms that cancel near z = 0
    static inline void both(Floats z, Floats* value, Floats* slope) {
        Floats e = exponential(-0.5f * z * z);
        Floats far = magnitude(z);
        far = far < 1e4f ? far : all(1e4f);  // infinity has no inverse here
        Floats t = inverse(1.0f + 0.54f * 0.70710678f * far) - 0.5f;
        Floats q = all(0.110652894f);
        q = q * t - 0.224486873f;
        q = q * t - 0.0958315581f;
        q = q * t + 0.486032426f;
        q = q * t + 0.931444466f;
        q = q * t + 0.890945554f;
        q = q * t + 0.272187799f;
        Floats tail = 0.5f * e * q;
        Floats below = z < 0.0f ? tail : 1.0f - tail;
        *value = z * below;
        *slope = below + z * 0.39894228f * e;
    }
};

struct GeluTanh {
    // 1 + tanh(u) and 1 - tanh(u)^2 by exp(-2 |u|), without a difference of near numbers
    static inline void both(Floats z, Floats* value, Floats* slope) {
        const float a = 0.79788456f, b = 0.044715f;
        Floats u = a * (z + b * z * z * z);
        Floats e = exponential(-2.0f * magnitude(u));
        Floats r = inverse(1.0f + e);
        Floats below = u < 0.0f ? e * r : r;
        *value = z * below;
        *slope = below + 2.0f * z * e * r * r * a * (1.0f + 3 * b * z * z);
    }
};

struct Relu {
    static inline void both(Floats z, Floats* value, Floats* slope) {
        *value = z < 0.0f ? all(0.0f) : z;  // keeps not-a-number
        *slope = z <= 0.0f ? all(0.0f) : all(1.0f);
    }
};

struct Silu {
    static inline void both(Floats z, Floats* value, Floats* slope) {
        Floats e = exponential(-magnitude(z));
        Floats s = (z < 0.0f ? e : all(1.0f)) * inverse(1.0f + e);
        *value = z * s;
        *slope = s * (1.0f + z * (1.0f - s));
    }
};

struct Tanh {
    static inline void both(Floats z, Floats* value, Floats* slope) {
        Floats e = exponential(-2.0f * magnitude(z));
        Floats r = inverse(1.0f + e);
        Floats far = (1.0f - e) * r;
        // near 0 that difference has few digits; the series of Cephes' tanhf has all
        Floats s = z * z;
        Floats near = all(-5.70498872745e-3f);
        near = near * s + 2.06390887954e-2f;
        near = near * s - 5.37397155531e-2f;
        near = near * s + 1.33314422036e-1f;
        near = near * s - 3.33332819422e-1f;
        near = near * s * z + z;
        *value = magnitude(z) < 0.625f ? near : z < 0.0f ? -far : far;
        *slope = 4.0f * e * r * r;
    }
};

// --------------------------------------------------------------------------- rows to columns

#ifdef __AVX2__
inline __m256i low_words(__m256i a, __m256i b) { return _mm256_unpacklo_epi32(a, b); }
inline __m256i high_words(__m256i a, __m256i b) { return _mm256_unpackhi_epi32(a, b); }
inline __m256i low_pairs(__m256i a, __m256i b) { return _mm256_unpacklo_epi64(a, b); }
inline __m256i high_pairs(__m256i a, __m256i b) { return _mm256_unpackhi_epi64(a, b); }
#ifdef __AVX512F__
inline __m512i low_words(__m512i a, __m512i b) { return _mm512_unpacklo_epi32(a, b); }
inline __m512i high_words(__m512i a, __m512i b) { return _mm512_unpackhi_epi32(a, b); }
inline __m512i low_pairs(__m512i a, __m512i b) { return _mm512_unpacklo_epi64(a, b); }
inline __m512i high_pairs(__m512i a, __m512i b) { return _mm512_unpackhi_epi64(a, b); }
#endif

// The 4 x 4 words of each 128 bits of four rows.
template <class Row>
inline void turn_fours(Row* r) {
    const Row low = low_words(r[0], r[1]), high = high_words(r[0], r[1]);
    const Row low_2 = low_words(r[2], r[3]), high_2 = high_words(r[2], r[3]);
    r[0] = low_pairs(low, low_2);
    r[1] = high_pairs(low, low_2);
    r[2] = low_pairs(high, high_2);
    r[3] = high_pairs(high, high_2);
}
#endif

// ------------------------------------------------------------------------------------ dropout

// Products of the even lanes, as 64-bit numbers.
inline Longs times(Words v, uint32_t factor) {
#ifdef __AVX512F__
    return bits_of<Longs>(_mm512_mul_epu32(bits_of<__m512i>(v), _mm512_set1_epi32(int(factor))));
#elif defined(__AVX2__)
    return bits_of<Longs>(_mm256_mul_epu32(bits_of<__m256i>(v), _mm256_set1_epi32(int(factor))));
#else
    return (bits_of<Longs>(v) & 0xffffffffu) * uint64_t(factor);
#endif
}

inline void multiply(Words v, uint32_t factor, Words* high, Words* low) {
    Longs even = times(v, factor);
    Longs odd = times(bits_of<Words>(bits_of<Longs>(v) >> 32), factor);
    *low = bits_of<Words>((even & 0xffffffffu) | (odd << 32));
    *high = bits_of<Words>((even >> 32) | (odd & 0xffffffff00000000u));
}

// The 16-bit numbers of one row: Philox4x32 with key seed + row and counters 0, 1, 2, ...
// `numbers` has room for a multiple of 8 LANES of them.
void draw(uint16_t* numbers, int64_t columns, int64_t key, int rounds) {
    const Words counter = bits_of<Words>(lanes());
    for (int64_t first = 0; first * 8 < columns; first += LANES) {
        Words a = counter + uint32_t(first), b = {}, c = {}, d = {};
        uint32_t k0 = uint32_t(key), k1 = uint32_t(uint64_t(key) >> 32);
        for (int round = 0; round < rounds; round++) {
            Words high_a, low_a, high_c, low_c;
            multiply(a, 0xD2511F53u, &high_a, &low_a);
            multiply(c, 0xCD9E8D57u, &high_c, &low_c);
            a = high_c ^ b ^ k0;
            b = low_c;
            c = high_a ^ d ^ k1;
            d = low_a;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        uint16_t* to = numbers + first * 8;
#ifdef __AVX512F__
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        const __m512i first_half = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
        const __m512i second_half = _mm512_add_epi64(first_half, _mm512_set1_epi64(4));
        for (const __m512i& half : {low, high}) {
            __m512i ab = _mm512_permutex2var_epi32(bits_of<__m512i>(a), half, bits_of<__m512i>(b));
            __m512i cd = _mm512_permutex2var_epi32(bits_of<__m512i>(c), half, bits_of<__m512i>(d));
            _mm512_storeu_si512(to, _mm512_permutex2var_epi64(ab, first_half, cd));
            _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi64(ab, second_half, cd));
            to += 64;
        }
#elif defined(__AVX2__)
        __m256i of_lanes[] = {bits_of<__m256i>(a), bits_of<__m256i>(b), bits_of<__m256i>(c),
                              bits_of<__m256i>(d)};
        turn_fours(of_lanes);  // lanes 0 and 4, 1 and 5, 2 and 6, 3 and 7
        for (int i = 0; i < 4; i++) {
            std::memcpy(to + 8 * i, &of_lanes[i], 16);
            const __m128i upper = _mm256_extracti128_si256(of_lanes[i], 1);
            std::memcpy(to + 8 * (i + 4), &upper, 16);
        }
#else
        for (int i = 0; i < LANES; i++) {
            const uint32_t words[4] = {a[i], b[i], c[i], d[i]};
            std::memcpy(to + 8 * i, words, sizeof words);
        }
#endif
    }
}

// What dropout is told; `Mask` has the numbers of one row.
struct Dropout {
    int32_t threshold;  // 0 without dropout
    float scale;
    int64_t seed;
    int rounds;
};

struct Mask {
    const Dropout drop;
    Buffer<uint16_t> numbers;

    Mask(const Dropout& drop, int64_t columns)
        : drop(drop), numbers((columns / (8 * LANES) + 1) * 8 * LANES) {}

    void row(int64_t row, int64_t columns) {
        draw(numbers.data, columns, drop.seed + row, drop.rounds);
    }

    Floats operator()(Floats v, int64_t column) const {
        Ints drawn = __builtin_convertvector(load_raw<Halves>(numbers.data + column), Ints);
        return drawn >= drop.threshold ? v * drop.scale : all(0.0f);
    }
};

// --------------------------------------------------------------------------- sums over tokens

inline void add(float* sum, int64_t j, Floats v) { narrow(sum + j, widen(sum + j) + v); }

// Partial sums of blocks of rows, which `finish` adds up.
struct Sums {
    const bool wanted;
    const int64_t blocks, columns, stride;
    Buffer<float> partial;

    Sums(bool wanted, int64_t rows, int64_t columns)
        : wanted(wanted),
          blocks(std::max<int64_t>(1, (rows + BLOCK - 1) / BLOCK)),
          columns(columns),
          stride(room(columns)),
          partial(wanted ? blocks * stride : 0) {
        if (wanted) std::memset(partial.data, 0, blocks * stride * sizeof(float));
    }

    float* block(int64_t i) { return wanted ? partial.data + i * stride : nullptr; }

    void finish(float* out) {
        if (!wanted) return;
        for (int64_t i = 1; i < blocks; i++)
            for (int64_t j = 0; j < stride; j += LANES)
                add(partial.data, j, widen(partial.data + i * stride + j));
        std::memcpy(out, partial.data, columns * sizeof(float));
    }
};

// Calls work(first row, last row, block) for each block of rows, `threads` at a time.
template <class Work>
void each_block(int64_t rows, int threads, Work work) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < blocks; i++) work(i * BLOCK, std::min(rows, (i + 1) * BLOCK), i);
}

template <class X>
void column_sum(const X* x, int64_t stride, float* out, int64_t rows, int64_t columns,
                const Dropout& like, int threads) {
    Sums sums(true, rows, columns);
    each_block(rows, threads, [&](int64_t first, int64_t last, int64_t block) {
        Mask drop(like, columns);
        float* sum = sums.block(block);
        for (int64_t i = first; i < last; i++) {
            if (like.threshold) drop.row(i, columns);
            sweep(columns, [&](int64_t j, auto at) {
                Floats v = at.load(x + i * stride + j);
                add(sum, j, like.threshold ? drop(v, j) : v);
            });
        }
    });
    sums.finish(out);
}

// ------------------------------------------------------------------------------------ softmax

// Zeros from a multiple of LANES to another.
template <class X>
inline void clear(X* row, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; j += LANES) narrow(row + j, Floats{});
}

// Scores of one query become dropped-out probabilities in `to`, with zeros up to `keys`, a
// multiple of LANES. With `gradient`, theirs, the scores' gradient goes to `out`. Each may be
// where it came from. The buffer has room for two rows.
template <class X, class Y>
inline void softmax_row(const X* scores, const X* gradient, Y* to, Y* out, int64_t length,
                        int64_t keys, float factor, const float* bias, const Mask& drop,
                        float* buffer) {
    float *p = buffer, *d = buffer + room(keys);
    const bool drops = drop.drop.threshold;
    Floats most = all(-INFINITY), total = {};
    sweep<Padded>(length, [&](int64_t j, auto at) {
        Floats v = at.load(scores + j) * factor;
        if (bias) v += at.load(bias + j);
        v = at.only(v, -INFINITY);
        narrow(p + j, v);
        most = v > most ? v : most;
    });
    const float top = most_of(most);
    sweep<Padded>(length, [&](int64_t j, auto at) {
        Floats v = exponential(widen(p + j) - top);
        narrow(p + j, v);
        total += at.only(v, 0.0f);
    });
    const float share = 1.0f / sum_of(total);
    if (!gradient) {
        sweep<Padded>(length, [&](int64_t j, auto at) {
            Floats v = widen(p + j) * share;
            at.store(to + j, drops ? drop(v, j) : v);
        });
    } else {
        Floats delta = {};
        sweep<Padded>(length, [&](int64_t j, auto at) {
            Floats v = widen(p + j) * share, dv = at.load(gradient + j);
            if (drops) dv = drop(dv, j);
            narrow(p + j, v);
            narrow(d + j, dv);
            at.store(to + j, drops ? drop(v, j) : v);
            delta += at.only(v * dv, 0.0f);
        });
        const float shift = sum_of(delta);
        sweep<Padded>(length, [&](int64_t j, auto at) {
            at.store(out + j, factor * widen(p + j) * (widen(d + j) - shift));
        });
        clear(out, room(length), keys);
    }
    clear(to, room(length), keys);
}

// -------------------------------------------------------------------------------- by its code

enum Kept { INPUT, SLOPE, LEVELS };  // what the backward pass of an activation is given

template <class Work>
void with_activation(int act, Work work) {
    switch (act) {
        case 0: return work(Gelu());
        case 1: return work(GeluTanh());
        case 2: return work(Relu());
        case 3: return work(Silu());
        default: return work(Tanh());
    }
}

}  // namespace
