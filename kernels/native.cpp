// The pointwise passes of a BitFit step for CPUs: what the Triton kernels do on a GPU, with the
// same dropout masks. Plain C functions over raw pointers, built on first use by native.py.
//
// Rows are worked on in fp32, 16 columns at a time and one row after the other, in buffers that
// the first-level cache holds. The 16 columns are one of the compiler's own vectors, which it
// breaks up for CPUs whose registers are narrower. Sums over tokens are taken in blocks of rows
// and then over blocks, both in a fixed order, so that the result depends neither on the number
// of threads nor on their luck.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using std::int64_t;

constexpr int64_t BLOCK = 32;  // rows of a partial sum
constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

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
#endif
    return bits_of<Floats>(__builtin_convertvector(load_raw<Halves>(from), Words) << 16);
}
inline Floats widen(const uint8_t* from) {
    return __builtin_convertvector(load_raw<Bytes>(from), Floats);
}

inline void narrow(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
inline void narrow(bf16* to, Floats v) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh(bits_of<__m512>(v));
    std::memcpy(to, &rounded, sizeof rounded);
#else
    // to the nearest, ties to even; what arithmetic makes of not-a-number stays so
    Words bits = bits_of<Words>(v);
    Halves rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
    std::memcpy(to, &rounded, sizeof rounded);
#endif
}
inline void narrow(uint8_t* to, Floats v) {
    Bytes cut = __builtin_convertvector(__builtin_convertvector(v, Ints), Bytes);
    std::memcpy(to, &cut, sizeof cut);
}

inline Floats all(float value) { return value - Floats{}; }

// Both reduce lanes i and i + 8, then i and i + 4, and so on.
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

// All 16 columns of a step, or the first few where a row ends.
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
        const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return lane < int32_t(count) ? v : all(other);
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

struct Gelu {
    // the normal distribution's tail is exp(-z^2 / 2) by a polynomial of t - 1/2; fitted, it is
    // 6e-9 off, and unlike one of t has no large terms that cancel near z = 0
    static inline void both(Floats z, Floats* value, Floats* slope) {
        Floats e = exponential(-0.5f * z * z);
        Floats t = 1.0f / (1.0f + 0.54f * 0.70710678f * magnitude(z)) - 0.5f;
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
        Floats r = 1.0f / (1.0f + e);
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
        Floats s = (z < 0.0f ? e : all(1.0f)) / (1.0f + e);
        *value = z * s;
        *slope = s * (1.0f + z * (1.0f - s));
    }
};

struct Tanh {
    static inline void both(Floats z, Floats* value, Floats* slope) {
        Floats e = exponential(-2.0f * magnitude(z));
        Floats r = 1.0f / (1.0f + e);
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

// ------------------------------------------------------------------------------------ dropout

// Products of the even lanes, as 64-bit numbers.
inline Longs times(Words v, uint32_t factor) {
#ifdef __AVX512F__
    return bits_of<Longs>(_mm512_mul_epu32(bits_of<__m512i>(v), _mm512_set1_epi32(int(factor))));
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
    Words counter;
    for (int i = 0; i < LANES; i++) counter[i] = i;
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

// ---------------------------------------------------------------------------------- LayerNorm

template <class X, class R, class Y>
void layer_norm_fwd(const X* x, int64_t stride, const float* b, const R* residual,
                    int64_t residual_stride, const float* gamma, const float* beta, Y* y, Y* sum,
                    Y* xhat, float* mean_out, float* rstd_out, int64_t rows, int64_t columns,
                    double eps, const Dropout& like, int threads) {
    each_block(rows, threads, [&](int64_t first, int64_t last, int64_t) {
        Mask drop(like, columns);
        Buffer<float> buffer(room(columns));
        float* s = buffer.data;
        const float *bias = b, *weight = gamma, *shift = beta;
        for (int64_t i = first; i < last; i++) {
            const X* from = x + i * stride;
            const R* other = residual ? residual + i * residual_stride : nullptr;
            Y* total_out = sum ? sum + i * columns : nullptr;
            if (like.threshold) drop.row(i, columns);
            Floats total = {};
            sweep(columns, [&](int64_t j, auto at) {
                Floats v = at.load(from + j);
                if (bias) v += at.load(bias + j);
                if (like.threshold) v = drop(v, j);
                if (other) v += at.load(other + j);
                if (total_out) {
                    at.store(total_out + j, v);
                    v = at.load(total_out + j);  // as the backward pass will read it
                }
                narrow(s + j, v);
                total += at.only(v, 0.0f);
            });
            float mean = sum_of(total) / float(columns);
            Floats square = {};
            sweep(columns, [&](int64_t j, auto at) {
                Floats v = widen(s + j) - mean;
                narrow(s + j, v);
                square += at.only(v * v, 0.0f);
            });
            float rstd = float(1.0 / std::sqrt(double(sum_of(square) / float(columns)) + eps));
            Y *out = y + i * columns, *hat = xhat ? xhat + i * columns : nullptr;
            sweep(columns, [&](int64_t j, auto at) {
                Floats v = widen(s + j) * rstd;
                if (hat) at.store(hat + j, v);
                v *= at.load(weight + j);
                if (shift) v += at.load(shift + j);
                at.store(out + j, v);
            });
            if (mean_out) mean_out[i] = mean;
            if (rstd_out) rstd_out[i] = rstd;
        }
    });
}

// `kept` is xhat, or with `mean` what was normalised. dx is written only where it is not ds.
template <class X, class R, class Y>
void layer_norm_bwd(const Y* dy, int64_t stride, const Y* kept, int64_t kept_stride,
                    const float* mean, const float* rstd, const float* gamma, const Y* dsum,
                    int64_t dsum_stride, R* ds, X* dx, float* dbeta, float* db, float* dgamma,
                    int64_t rows, int64_t columns, const Dropout& like, int threads) {
    Sums beta_sums(dbeta, rows, columns), b_sums(db, rows, columns);
    Sums gamma_sums(dgamma, rows, columns);
    each_block(rows, threads, [&](int64_t first, int64_t last, int64_t block) {
        Mask drop(like, columns);
        Buffer<float> buffer(2 * room(columns));
        float *t = buffer.data, *hat = t + room(columns);
        float *beta_sum = beta_sums.block(block), *b_sum = b_sums.block(block);
        float* gamma_sum = gamma_sums.block(block);
        const float* weight = gamma;
        const bool normalise = mean;
        for (int64_t i = first; i < last; i++) {
            const Y *from = dy + i * stride, *row = kept + i * kept_stride;
            float shift = mean ? mean[i] : 0.0f, scale = mean ? rstd[i] : 1.0f, r = rstd[i];
            Floats total = {}, product = {};
            sweep(columns, [&](int64_t j, auto at) {
                Floats v = at.load(from + j), h = at.load(row + j);
                if (normalise) h = (h - shift) * scale;
                if (beta_sum) add(beta_sum, j, v);
                if (gamma_sum) add(gamma_sum, j, at.only(v * h, 0.0f));
                v *= at.load(weight + j);
                narrow(hat + j, h);
                narrow(t + j, v);
                total += v;
                product += v * h;
            });
            float c1 = sum_of(total) / float(columns), c2 = sum_of(product) / float(columns);
            const Y* other = dsum ? dsum + i * dsum_stride : nullptr;
            R* to = ds + i * columns;
            X* out = dx ? dx + i * columns : nullptr;
            if (like.threshold) drop.row(i, columns);
            sweep(columns, [&](int64_t j, auto at) {
                Floats v = r * (widen(t + j) - c1 - widen(hat + j) * c2);
                if (other) v += at.load(other + j);
                at.store(to + j, v);
                if (like.threshold) v = drop(v, j);
                if (out) at.store(out + j, v);
                if (b_sum) add(b_sum, j, v);
            });
        }
    });
    beta_sums.finish(dbeta);
    b_sums.finish(db);
    gamma_sums.finish(dgamma);
}

// --------------------------------------------------------------------------------- activation

// `slope` may be `x` itself. `levels` gets act' in 8 bits.
template <class Act, class X>
void activation_fwd(const X* x, int64_t stride, const float* b, X* h, X* slope, uint8_t* levels,
                    float low, float step, int64_t rows, int64_t columns, int threads) {
    each_block(rows, threads, [&](int64_t first, int64_t last, int64_t) {
        const float *bias = b, start = low, inverse = 1.0f / step;
        for (int64_t i = first; i < last; i++) {
            const X* from = x + i * stride;
            X *to = h + i * columns, *out = slope ? slope + i * columns : nullptr;
            uint8_t* level = levels ? levels + i * columns : nullptr;
            sweep(columns, [=](int64_t j, auto at) {
                Floats v = at.load(from + j), value, derivative;
                if (bias) v += at.load(bias + j);
                Act::both(v, &value, &derivative);
                at.store(to + j, value);
                if (out) at.store(out + j, derivative);
                if (level) at.store(level + j, (derivative - start) * inverse + 0.5f);
            });
        }
    });
}

enum Kept { INPUT, SLOPE, LEVELS };

// dz may be dh itself.
template <class Act, class X>
void activation_bwd(const X* dh, int64_t stride, const void* kept, int64_t kept_stride, Kept kind,
                    const float* b, float low, float step, X* dz, float* db, int64_t rows,
                    int64_t columns, int threads) {
    Sums sums(db, rows, columns);
    const X* wide = static_cast<const X*>(kept);
    const uint8_t* levels = static_cast<const uint8_t*>(kept);
    each_block(rows, threads, [&](int64_t first, int64_t last, int64_t block) {
        float* sum = sums.block(block);
        const float *bias = b, start = low, size = step;
        const Kept what = kind;
        for (int64_t i = first; i < last; i++) {
            const X *from = dh + i * stride, *row = wide + i * kept_stride;
            const uint8_t* level = levels + i * kept_stride;
            X* to = dz + i * columns;
            sweep(columns, [=](int64_t j, auto at) {
                Floats derivative = what == LEVELS ? at.load(level + j) * size + start
                                                   : at.load(row + j);
                if (what == INPUT) {
                    Floats value;
                    if (bias) derivative += at.load(bias + j);
                    Act::both(derivative, &value, &derivative);
                }
                Floats v = at.load(from + j) * derivative;
                at.store(to + j, v);
                if (sum) add(sum, j, v);
            });
        }
    });
    sums.finish(db);
}

// ---------------------------------------------------------------------------------- attention

// The rows of a group of sequences that are padded to one length: scores [n, H, Sq, Sk].
// Sk is a multiple of LANES.
struct Group {
    const int32_t *starts_q, *lengths_q, *lengths_k;  // of each sequence, in the packed rows
    int64_t sequences, heads, queries, keys;
    const float* bias;  // [H, *, *] with these strides, or null
    int64_t bias_head, bias_query;
    float scale;
};

// Zeros from a multiple of LANES to another.
template <class X>
inline void clear(X* row, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; j += LANES) narrow(row + j, Floats{});
}

// Scores become dropped-out probabilities, and `gradients`, theirs, become those of the scores.
template <class X>
void softmax(X* scores, X* gradients, const Group& g, const Dropout& like, int threads) {
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (int64_t n = 0; n < g.sequences; n++) {
        for (int64_t h = 0; h < g.heads; h++) {
            Mask drop(like, g.keys);
            Buffer<float> buffer(2 * room(g.keys));
            float *p = buffer.data, *d = p + room(g.keys);
            const int64_t length = g.lengths_k[n];
            const float factor = g.scale;
            for (int64_t i = 0; i < g.queries; i++) {
                int64_t at_row = ((n * g.heads + h) * g.queries + i) * g.keys;
                X *row = scores + at_row, *gradient = gradients ? gradients + at_row : nullptr;
                if (i >= g.lengths_q[n]) {
                    clear(row, 0, g.keys);
                    if (gradient) clear(gradient, 0, g.keys);
                    continue;
                }
                const float* bias =
                    g.bias ? g.bias + h * g.bias_head + i * g.bias_query : nullptr;
                if (like.threshold) drop.row((g.starts_q[n] + i) * g.heads + h, length);
                Floats most = all(-INFINITY), total = {};
                sweep<Padded>(length, [&](int64_t j, auto at) {
                    Floats v = at.load(row + j) * factor;
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
                const float inverse = 1.0f / sum_of(total);
                if (!gradient) {
                    sweep<Padded>(length, [&](int64_t j, auto at) {
                        Floats v = widen(p + j) * inverse;
                        at.store(row + j, like.threshold ? drop(v, j) : v);
                    });
                } else {
                    Floats delta = {};
                    sweep<Padded>(length, [&](int64_t j, auto at) {
                        Floats v = widen(p + j) * inverse, dv = at.load(gradient + j);
                        if (like.threshold) dv = drop(dv, j);
                        narrow(p + j, v);
                        narrow(d + j, dv);
                        at.store(row + j, like.threshold ? drop(v, j) : v);
                        delta += at.only(v * dv, 0.0f);
                    });
                    const float shift = sum_of(delta);
                    sweep<Padded>(length, [&](int64_t j, auto at) {
                        at.store(gradient + j, factor * widen(p + j) * (widen(d + j) - shift));
                    });
                    clear(gradient, room(length), g.keys);
                }
                clear(row, room(length), g.keys);
            }
        }
    }
}

// The size is known at run time only, and a call of memcpy for a head's row takes longer than it.
inline void copy(void* to, const void* from, int64_t bytes) {
    char* t = static_cast<char*>(to);
    const char* f = static_cast<const char*>(from);
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) std::memcpy(t + i, f + i, 64);
    if (i < bytes) std::memcpy(t + i, f + i, bytes - i);
}

// Rows [*, H, D] of a packed tensor to [n, H, S, D] with zeros behind each sequence, or back.
template <class X>
void spread(X* packed, int64_t stride, const int32_t* starts, const int32_t* lengths, X* padded,
            int64_t sequences, int64_t heads, int64_t longest, int64_t size, bool back,
            int threads) {
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (int64_t n = 0; n < sequences; n++) {
        for (int64_t h = 0; h < heads; h++) {
            X* rows = padded + (n * heads + h) * longest * size;
            X* tokens = packed + starts[n] * stride + h * size;
            for (int64_t i = 0; i < lengths[n]; i++) {
                X *row = rows + i * size, *token = tokens + i * stride;
                copy(back ? token : row, back ? row : token, size * sizeof(X));
            }
            if (!back)
                std::memset(rows + lengths[n] * size, 0,
                            (longest - lengths[n]) * size * sizeof(X));
        }
    }
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

template <class X>
void drop_rows(const X* x, int64_t stride, X* y, int64_t rows, int64_t columns,
               const Dropout& like, int threads) {
    each_block(rows, threads, [&](int64_t first, int64_t last, int64_t) {
        Mask drop(like, columns);
        for (int64_t i = first; i < last; i++) {
            drop.row(i, columns);
            sweep(columns, [&](int64_t j, auto at) {
                at.store(y + i * columns + j, drop(at.load(x + i * stride + j), j));
            });
        }
    });
}

}  // namespace

// --------------------------------------------------------- what native.py calls: dtype codes
// A dtype is 0 for fp32 and 1 for bf16. Where two tensors meet, results have the wider one.

#define WITH_TYPE(code, X, ...)      \
    if (code) {                      \
        using X = bf16;              \
        __VA_ARGS__;                 \
    } else {                         \
        using X = float;             \
        __VA_ARGS__;                 \
    }

namespace {
template <class A, class B>
struct Wider {
    using type = float;
};
template <>
struct Wider<bf16, bf16> {
    using type = bf16;
};

template <class X, class Work>
void with_activation(int act, Work work) {
    switch (act) {
        case 0: return work(Gelu());
        case 1: return work(GeluTanh());
        case 2: return work(Relu());
        case 3: return work(Silu());
        default: return work(Tanh());
    }
}

template <class X>
X* of(void* pointer) {
    return static_cast<X*>(pointer);
}
}  // namespace

extern "C" {

void bitfit_layer_norm_fwd(int x_type, int r_type, void* x, int64_t x_stride, const float* b,
                           void* residual, int64_t r_stride, const float* gamma, const float* beta,
                           void* y, void* sum, void* xhat, float* mean, float* rstd, int64_t rows,
                           int64_t columns, double eps, int threshold, float scale, int64_t seed,
                           int rounds, int threads) {
    Dropout drop{threshold, scale, seed, rounds};
    WITH_TYPE(x_type, X, WITH_TYPE(r_type, R, {
        using Y = typename Wider<X, R>::type;
        layer_norm_fwd<X, R, Y>(of<X>(x), x_stride, b, of<R>(residual), r_stride, gamma, beta,
                                of<Y>(y), of<Y>(sum), of<Y>(xhat), mean, rstd, rows, columns, eps,
                                drop, threads);
    }))
}

void bitfit_layer_norm_bwd(int x_type, int r_type, void* dy, int64_t dy_stride, void* kept,
                           int64_t kept_stride, const float* mean, const float* rstd,
                           const float* gamma, void* dsum, int64_t dsum_stride, void* ds, void* dx,
                           float* dbeta, float* db, float* dgamma, int64_t rows, int64_t columns,
                           int threshold, float scale, int64_t seed, int rounds, int threads) {
    Dropout drop{threshold, scale, seed, rounds};
    WITH_TYPE(x_type, X, WITH_TYPE(r_type, R, {
        using Y = typename Wider<X, R>::type;
        layer_norm_bwd<X, R, Y>(of<Y>(dy), dy_stride, of<Y>(kept), kept_stride, mean, rstd, gamma,
                                of<Y>(dsum), dsum_stride, of<R>(ds), of<X>(dx), dbeta, db, dgamma,
                                rows, columns, drop, threads);
    }))
}

void bitfit_activation_fwd(int type, int act, void* x, int64_t stride, const float* b, void* h,
                           void* slope, uint8_t* levels, float low, float step, int64_t rows,
                           int64_t columns, int threads) {
    WITH_TYPE(type, X, with_activation<X>(act, [&](auto a) {
        activation_fwd<decltype(a), X>(of<X>(x), stride, b, of<X>(h), of<X>(slope), levels, low,
                                       step, rows, columns, threads);
    }))
}

void bitfit_activation_bwd(int type, int act, void* dh, int64_t stride, void* kept,
                           int64_t kept_stride, int kind, const float* b, float low, float step,
                           void* dz, float* db, int64_t rows, int64_t columns, int threads) {
    WITH_TYPE(type, X, with_activation<X>(act, [&](auto a) {
        activation_bwd<decltype(a), X>(of<X>(dh), stride, kept, kept_stride, Kept(kind), b, low,
                                       step, of<X>(dz), db, rows, columns, threads);
    }))
}

void bitfit_softmax(int type, void* scores, void* gradients, const int32_t* starts_q,
                    const int32_t* lengths_q, const int32_t* lengths_k, int64_t sequences,
                    int64_t heads, int64_t queries, int64_t keys, const float* bias,
                    int64_t bias_head, int64_t bias_query, float factor, int threshold,
                    float scale, int64_t seed, int rounds, int threads) {
    Dropout drop{threshold, scale, seed, rounds};
    Group group{starts_q, lengths_q, lengths_k, sequences, heads,      queries,
                keys,     bias,      bias_head, bias_query, factor};
    WITH_TYPE(type, X, {
        softmax<X>(of<X>(scores), of<X>(gradients), group, drop, threads);
    })
}

void bitfit_spread(int type, int back, void* packed, int64_t stride, const int32_t* starts,
                   const int32_t* lengths, void* padded, int64_t sequences, int64_t heads,
                   int64_t longest, int64_t size, int threads) {
    WITH_TYPE(type, X, {
        spread<X>(of<X>(packed), stride, starts, lengths, of<X>(padded), sequences, heads,
                  longest, size, back, threads);
    })
}

void bitfit_column_sum(int type, void* x, int64_t stride, float* out, int64_t rows,
                       int64_t columns, int threshold, float scale, int64_t seed, int rounds,
                       int threads) {
    Dropout drop{threshold, scale, seed, rounds};
    WITH_TYPE(type, X,
              column_sum<X>(of<X>(x), stride, out, rows, columns, drop, threads))
}

void bitfit_dropout(int type, void* x, int64_t stride, void* y, int64_t rows, int64_t columns,
                    int threshold, float scale, int64_t seed, int rounds, int threads) {
    Dropout drop{threshold, scale, seed, rounds};
    WITH_TYPE(type, X,
              drop_rows<X>(of<X>(x), stride, of<X>(y), rows, columns, drop, threads))
}

void bitfit_kept(uint8_t* out, int64_t rows, int64_t columns, int threshold, int64_t seed,
                 int rounds, int threads) {
    Dropout like{threshold, 1.0f, seed, rounds};
    each_block(rows, threads, [&](int64_t first, int64_t last, int64_t) {
        Mask drop(like, columns);
        for (int64_t i = first; i < last; i++) {
            drop.row(i, columns);
            uint8_t* to = out + i * columns;
            for (int64_t j = 0; j < columns; j++) to[j] = int32_t(drop.numbers.data[j]) >= threshold;
        }
    });
}
}
