// Products with frozen weights, and attention, by the matrix units of CPUs (AMX): 32 x 32 numbers
// at a time, 32 products each a step, in bf16 with sums in fp32.
//
// An fp32 number is the sum of three in bf16, of 8 bits each, exactly: what rounding leaves is
// rounded again, twice. (Below 1e-33 the smallest parts would be denormal, which these units take
// for zero; above 3.38e38, infinity included, the sum is not a number.) Of the nine products of
// two such numbers the three of the smallest parts are below fp32's rounding, and left out; that
// is still faster than the vector units.
//
// A weight never changes, so it is packed once, for the forward and for the backward pass: panels
// of 32 columns, in each the steps one after the other, 2 KB that are loaded as they are. What
// follows a product, bias, residual, activation and sums over tokens, is done on each 32 x 32
// numbers of it while they are in the first-level cache.
#pragma once

#include "norm.h"
#include "vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__linux__)
#define BITFIT_TILES
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int SIDE = 32;                // rows and columns of a product, and its depth in a step
constexpr int64_t PART = SIDE * SIDE;   // numbers of a step
constexpr int64_t HALF = PART / 2;      // of one tile
constexpr int64_t PANELS = 768 << 10;   // bytes of a weight that the second-level cache keeps,
constexpr int64_t ROWS = 768 << 10;     // and of what is multiplied by it
constexpr int64_t END_ROWS = 1280 << 10;  // and of all that a layer's end holds of some rows
constexpr int64_t SLICE = 384;

static_assert(BLOCK == SIDE, "sums over tokens are taken in the same blocks");

inline int64_t whole(int64_t count) { return (count + SIDE - 1) / SIDE; }

// Linux lets a process use tiles when it has asked to.
inline bool may_use_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    static const bool may = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
    return may;
}

// All eight tiles as large as they can be, 16 rows of 64 bytes, while this lives.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; i++) {
            shape.bytes[i] = 64;
            shape.rows[i] = 16;
        }
        _tile_loadconfig(&shape);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
};

// How many bf16 numbers make up one of type X. They lie in as many planes.
template <class X>
constexpr int PLANES = sizeof(X) == sizeof(float) ? 3 : 1;

// What bf16 has of v.
inline Floats rounded(Floats v) {
    __m256i halves = bits_of<__m256i>(_mm512_cvtneps_pbh(bits_of<__m512>(v)));
    return bits_of<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// 16 numbers of type X, `plane` from part to part.
template <class X>
inline void split(bf16* to, int64_t plane, Floats v) {
    for (int i = 1; i < PLANES<X>; i++, to += plane) {
        narrow(to, v);
        v -= rounded(v);
    }
    narrow(to, v);
}

// 16 numbers that are there, or zeros.
inline void copy_parts(const bf16* from, bf16* to, int64_t) {
    const __m256i numbers = from ? load_raw<__m256i>(from) : _mm256_setzero_si256();
    std::memcpy(to, &numbers, sizeof numbers);
}
inline void copy_parts(const float* from, bf16* to, int64_t plane) {
    split<float>(to, plane, from ? widen(from) : Floats{});
}

// An operand's numbers; of fp32, the second and third parts are `plane` and twice that further on.
struct Operand {
    const bf16* data;
    int64_t plane;

    const bf16* operator[](int part) const { return data + part * plane; }
    Operand operator+(int64_t count) const { return {data + count, plane}; }
};

// The left operand of a product: 32 rows, in two halves of 16.
struct Rows {
    Operand all;
    int64_t half, stride, step;  // to the second half, the next row, the next step
};

inline Rows packed_rows(Operand all) { return {all, HALF, SIDE, PART}; }
inline Rows plain_rows(Operand all, int64_t stride) { return {all, 16 * stride, stride, SIDE}; }

// out [32, 32] = rows x panel, over `steps` steps. The matrix unit works on its own, so other
// work is done in between: between(i) before step i.
template <class X, class Between>
inline void multiply(const Rows& rows, Operand panel, int64_t steps, float* out,
                     int64_t out_stride, Between between) {
    const int64_t bytes = rows.stride * sizeof(bf16), out_bytes = out_stride * sizeof(float);
    const auto left = [&](int part, int64_t i) {
        const bf16* a = rows.all[part] + i * rows.step;
        _tile_loadd(4, a, bytes);
        _tile_loadd(5, a + rows.half, bytes);
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

template <class X>
inline void multiply(const Rows& rows, Operand panel, int64_t steps, float* out,
                     int64_t out_stride = SIDE) {
    multiply<X>(rows, panel, steps, out, out_stride, [](int64_t) {});
}

// A right operand [depth, columns], where the numbers of a column are `row` apart and those of a
// row `column`; both sizes are multiples of 32. Its planes lie one after the other.
template <class X>
void pack(const X* from, int64_t row, int64_t column, int64_t depth, int64_t columns, bf16* to,
          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < columns / SIDE; panel++) {
        bf16* out = to + panel * depth * SIDE;
        for (int64_t k = 0; k < depth; k += SIDE)
            for (int half = 0; half < 2; half++)
                for (int pair = 0; pair < 16; pair++, out += SIDE) {
                    X numbers[SIDE];
                    for (int j = 0; j < SIDE; j++)
                        numbers[j] = from[(k + 2 * pair + j % 2) * row +
                                          (panel * SIDE + 16 * half + j / 2) * column];
                    for (int j = 0; j < SIDE; j += LANES)
                        copy_parts(numbers + j, out + j, depth * columns);
                }
    }
}

// Where column j of row i lies in a left operand.
inline int64_t gathered_at(int64_t i, int64_t j, int64_t depth) {
    return i / SIDE * SIDE * depth + j / SIDE * PART + i % SIDE * SIDE + j % SIDE;
}

// Rows as a left operand, block by block of 32; zeros stand behind the last.
template <class X>
void gather_rows(const X* from, int64_t stride, int64_t count, int64_t depth, bf16* to,
                 int64_t plane) {
    for (int64_t i = 0; i < whole(count) * SIDE; i++) {
        const X* row = i < count ? from + i * stride : nullptr;
        for (int64_t k = 0; k < depth; k += LANES)
            copy_parts(row ? row + k : nullptr, to + gathered_at(i, k, depth), plane);
    }
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

// A packed weight [depth, columns], whose panels are `panel` numbers apart.
struct Weight {
    const bf16* data;
    int64_t panel, depth, columns, plane;

    // Some of its rows, from a multiple of 32 on.
    Weight rows(int64_t first, int64_t count) const {
        return {data + first * SIDE, panel, count, columns, plane};
    }
};

// Calls done(numbers, first row, rows, first column), 32 columns and any number of rows at a time,
// for gathered rows times some panels of a weight. That is done for one part while the next is
// multiplied.
template <class X, class Done>
void multiply_rows(Operand gathered, int64_t count, const Weight& weight, int64_t first_panel,
                   int64_t last_panel, Done done) {
    const int64_t steps = weight.depth / SIDE, rows_a_step = (SIDE + steps - 1) / steps;
    const int64_t bytes = weight.depth * SIDE * sizeof(bf16) * PLANES<X>;
    const int64_t at_once = std::max<int64_t>(1, PANELS / bytes);
    const Operand panels{weight.data, weight.plane};
    alignas(64) float parts[2 * PART];
    float *now = parts, *before = parts + PART;
    int64_t row = 0, rows = 0, column = 0;  // of the part before
    const auto finish = [&](int64_t from, int64_t to) {
        to = std::min(to, rows);
        if (from < to) done(before + from * SIDE, row + from, to - from, column);
    };
    for (int64_t p = first_panel; p < last_panel; p += at_once) {
        for (int64_t i = 0; i < count; i += SIDE) {
            for (int64_t q = p; q < std::min(last_panel, p + at_once); q++) {
                multiply<X>(packed_rows(gathered + i * weight.depth), panels + q * weight.panel,
                            steps, now, SIDE, [&](int64_t step) {
                                
                                finish(step * rows_a_step, (step + 1) * rows_a_step);
                            });
                std::swap(now, before);
                row = i, rows = std::min<int64_t>(SIDE, count - i), column = q * SIDE;
            }
        }
    }
    finish(0, SIDE);
}

// How many blocks of 32 rows a thread works on at once, of that width: they stay in its
// second-level cache, and a weight passes through it once for all of them.
template <class X>
inline int64_t blocks_at_once(int64_t width) {
    const int64_t bytes = width * SIDE * sizeof(bf16) * PLANES<X>;
    return std::max<int64_t>(1, std::min<int64_t>(8, ROWS / bytes));
}

// Calls done(numbers, first row, rows, first column) for x times a packed weight.
template <class X, class Done>
void product(const X* x, int64_t stride, const Weight& weight, int64_t rows, int threads,
             Done done) {
    const int64_t blocks = whole(rows), panels = weight.columns / SIDE;
    const int64_t down = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
    const int64_t across = std::max<int64_t>(1, std::min<int64_t>(threads / down, panels));
    const int64_t chunk = blocks_at_once<X>(weight.depth), plane = chunk * SIDE * weight.depth;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < down * across; part++) {
        Tiles tiles;
        Buffer<bf16> gathered(plane * PLANES<X>);
        const int64_t last = blocks * (part / across + 1) / down;
        for (int64_t i = blocks * (part / across) / down; i < last; i += chunk) {
            const int64_t first = i * SIDE;
            const int64_t count = std::min(rows, std::min(last, i + chunk) * SIDE) - first;
            gather_rows(x + first * stride, stride, count, weight.depth, gathered.data, plane);
            multiply_rows<X>({gathered.data, plane}, count, weight,
                             panels * (part % across) / across,
                             panels * (part % across + 1) / across,
                             [&](const float* numbers, int64_t row, int64_t some, int64_t column) {
                                 done(numbers, first + row, some, column);
                             });
        }
    }
}

// Calls work(16 numbers, their row, their first column) for the real rows of a part.
template <class Work>
inline void each_vector(const float* part, int64_t row, int64_t count, int64_t column, Work work) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < SIDE; j += LANES)
            work(widen(part + i * SIDE + j), row + i, column + j);
}

// y = x W + b, or y += x W.
template <class X>
void linear(const X* x, int64_t stride, const Weight& weight, const float* b, X* y, bool onto,
            int64_t rows, int threads) {
    product(x, stride, weight, rows, threads, [=](auto... part) {
        each_vector(part..., [=](Floats v, int64_t i, int64_t j) {
            X* to = y + i * weight.columns + j;
            if (b) v += widen(b + j);
            if (onto) v += widen(to);
            narrow(to, v);
        });
    });
}

// What an activation's backward pass is given: act's input or act', or act' in 8 bits from `low`
// on in steps of `step`.
struct Slopes {
    void* data;
    Kept kind;
    float low, step;

    template <class X>
    void keep(int64_t at, Floats derivative) const {
        if (kind == LEVELS)
            narrow(static_cast<uint8_t*>(data) + at, (derivative - low) * (1.0f / step) + 0.5f);
        else
            narrow(static_cast<X*>(data) + at, derivative);
    }

    template <class Act, class X>
    Floats get(int64_t at, const float* b) const {
        if (kind == LEVELS) return widen(static_cast<const uint8_t*>(data) + at) * step + low;
        Floats v = widen(static_cast<const X*>(data) + at), value;
        if (kind == INPUT) {
            if (b) v += widen(b);
            Act::both(v, &value, &v);
        }
        return v;
    }
};

// h = act(x W + b), and act' where it is kept.
template <class Act, class X>
void linear_activation(const X* x, int64_t stride, const Weight& weight, const float* b, X* h,
                       const Slopes& slopes, int64_t rows, int threads) {
    product(x, stride, weight, rows, threads, [=](auto... part) {
        each_vector(part..., [=](Floats v, int64_t i, int64_t j) {
            Floats value, derivative;
            if (b) v += widen(b + j);
            Act::both(v, &value, &derivative);
            narrow(h + i * weight.columns + j, value);
            if (slopes.data) slopes.keep<X>(i * weight.columns + j, derivative);
        });
    });
}

// dz = (dy W) act', and its sum over tokens.
template <class Act, class X>
void linear_activation_bwd(const X* dy, int64_t stride, const Weight& weight,
                           const Slopes& slopes, const float* b, X* dz, float* db, int64_t rows,
                           int threads) {
    Sums sums(db, rows, weight.columns);
    product(dy, stride, weight, rows, threads,
            [=, &sums](const float* part, int64_t row, int64_t count, int64_t column) {
        float* sum = sums.block(row / SIDE);
        each_vector(part, row, count, column, [=](Floats v, int64_t i, int64_t j) {
            const int64_t at = i * weight.columns + j;
            v *= slopes.get<Act, X>(at, b ? b + j : nullptr);
            narrow(dz + at, v);
            if (sum) add(sum, j, v);
        });
    });
    sums.finish(db);
}

// ---------------------------------------------------------- all of a layer that is not attention

// Bias, dropout, residual and LayerNorm behind a product, and what is kept of it.
template <class X>
struct Junction {
    const float *b, *gamma, *beta;
    double eps;
    X* xhat;
    float* rstd;
    int threshold;
    float scale;
    int64_t seed;

    Dropout drop(int rounds) const { return {threshold, scale, seed, rounds}; }
};

// Calls work(first row, rows, scratch) for pieces of some rows that stay in a thread's cache.
template <class Work>
void each_chunk(int64_t rows, int64_t bytes_a_row, int threads, Work work) {
    const int64_t blocks = whole(rows), most = END_ROWS / (bytes_a_row * SIDE);
    const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(8, most));
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < parts; part++) {
        Tiles tiles;
        const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        const int64_t pieces = std::max<int64_t>(1, (end - begin + chunk - 1) / chunk);
        Scratch scratch((chunk * bytes_a_row + 1024) * SIDE);
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t first = (begin + (end - begin) * piece / pieces) * SIDE;
            const int64_t last = (begin + (end - begin) * (piece + 1) / pieces) * SIDE;
            scratch.used = 0;
            work(first, std::min(rows, last) - first, scratch);
        }
    }
}

// How many columns of the feed-forward block there are at a time: all of them in bf16; those of
// fp32 would fill the cache with few rows, for which a weight would pass through it again.
template <class X>
inline int64_t columns_at_once(int64_t inner) {
    return PLANES<X> == 1 ? inner : std::min(inner, SLICE);
}

// y = LN(s + dropout(act(s W_up + b_up) W_down + b)), where s = LN(x + dropout(o W_out + b)): what a
// post-norm layer does behind attention, whose heads gave `o`, without leaving the cache between.
template <class Act, class X>
void layer_end(const X* o, const X* x, const Weight& out, const Junction<X>& middle,
               const Weight& up, const float* b, const Slopes& slopes, const Weight& down,
               const Junction<X>& end, X* y, int64_t rows, int rounds, int threads) {
    const int64_t width = out.columns, inner = up.columns, slice = columns_at_once<X>(inner);
    each_chunk(rows, 2 * PLANES<X> * (width + slice) + 2 * sizeof(X) * width, threads,
               [&](int64_t first, int64_t count, Scratch& scratch) {
        const int64_t size = whole(count) * SIDE;
        bf16* gathered = scratch.take<bf16>(PLANES<X> * size * width);
        bf16* h = scratch.take<bf16>(PLANES<X> * size * slice);
        X *z = scratch.take<X>(size * width), *s = scratch.take<X>(size * width);
        const Operand of_width{gathered, size * width}, of_slice{h, size * slice};
        bool onto = false;
        const auto keep_rows = [&](auto... part) {
            each_vector(part..., [&](Floats v, int64_t i, int64_t j) {
                if (onto) v += widen(z + i * width + j);
                narrow(z + i * width + j, v);
            });
        };
        // rows are numbered as in the whole batch, by which dropout goes
        const int64_t before = first * width;
        gather_rows(o + before, width, count, width, gathered, of_width.plane);
        multiply_rows<X>(of_width, count, out, 0, width / SIDE, keep_rows);
        LayerNorm<X, X, X>{z - before, width, middle.b, x, width, middle.gamma, middle.beta,
                           s - before, nullptr, middle.xhat, nullptr, middle.rstd, width,
                           middle.eps, middle.drop(rounds)}(first, first + count);
        gather_rows(s, width, count, width, gathered, of_width.plane);
        for (int64_t left = 0; left < inner; left += slice) {
            const int64_t some = std::min(slice, inner - left);
            multiply_rows<X>(of_width, count, up, left / SIDE, (left + some) / SIDE,
                             [&](auto... part) {
                each_vector(part..., [&](Floats v, int64_t i, int64_t j) {
                    Floats value, derivative;
                    if (b) v += widen(b + j);
                    Act::both(v, &value, &derivative);
                    split<X>(h + gathered_at(i, j - left, some), of_slice.plane, value);
                    if (slopes.data) slopes.keep<X>((first + i) * inner + j, derivative);
                });
            });
            // behind the last row stands what stood there before; it is multiplied, and left out
            multiply_rows<X>(of_slice, count, down.rows(left, some), 0, width / SIDE, keep_rows);
            onto = true;
        }
        LayerNorm<X, X, X>{z - before, width, end.b, s - before, width, end.gamma, end.beta, y,
                           nullptr, end.xhat, nullptr, end.rstd, width, end.eps,
                           end.drop(rounds)}(first, first + count);
    });
}

// The gradients of o and x, by weights packed for the backward pass, and those of the biases: of
// the end's beta and b, of b_up, and of the middle's beta and b.
template <class Act, class X>
void layer_end_bwd(const X* dy, const Weight& out, const Junction<X>& middle, const Weight& up,
                   const float* b, const Slopes& slopes, const Weight& down,
                   const Junction<X>& end, X* dout, X* dx, float* const* sums_out, int64_t rows,
                   int rounds, int threads) {
    const int64_t width = out.columns, inner = down.columns, slice = columns_at_once<X>(inner);
    Sums end_beta(sums_out[0], rows, width), end_b(sums_out[1], rows, width);
    Sums up_b(sums_out[2], rows, inner);
    Sums middle_beta(sums_out[3], rows, width), middle_b(sums_out[4], rows, width);
    each_chunk(rows, 2 * PLANES<X> * (width + slice) + 2 * sizeof(X) * width, threads,
               [&](int64_t first, int64_t count, Scratch& scratch) {
        const int64_t size = whole(count) * SIDE, before = first * width;
        bf16* gathered = scratch.take<bf16>(PLANES<X> * size * width);
        bf16* du = scratch.take<bf16>(PLANES<X> * size * slice);
        X *ds = scratch.take<X>(size * width), *dz = scratch.take<X>(size * width);
        const Operand of_width{gathered, size * width}, of_slice{du, size * slice};
        const auto norm = [&](const X* from, const Junction<X>& at, X* to, Sums& beta,
                              Sums& bias) {
            const Dropout like = at.drop(rounds);
            LayerNormBwd<X, X, X> bwd{from, width, at.xhat, width, nullptr, at.rstd, at.gamma,
                                      nullptr, 0, to, like.threshold ? dz - before : nullptr,
                                      width, like};
            for (int64_t i = first; i < first + count; i += SIDE)
                bwd(i, std::min(first + count, i + SIDE), beta.block(i / SIDE),
                    bias.block(i / SIDE), nullptr);
            gather_rows(like.threshold ? dz : to + before, width, count, width, gathered,
                        of_width.plane);
        };
        norm(dy, end, ds - before, end_beta, end_b);
        for (int64_t left = 0; left < inner; left += slice) {
            const int64_t columns = std::min(slice, inner - left);
            multiply_rows<X>(of_width, count, down, left / SIDE, (left + columns) / SIDE,
                             [&](const float* part, int64_t row, int64_t some, int64_t column) {
                float* sum = up_b.block((first + row) / SIDE);
                each_vector(part, row, some, column, [&](Floats v, int64_t i, int64_t j) {
                    v *= slopes.get<Act, X>((first + i) * inner + j, b ? b + j : nullptr);
                    split<X>(du + gathered_at(i, j - left, columns), of_slice.plane, v);
                    if (sum) add(sum, j, v);
                });
            });
            multiply_rows<X>(of_slice, count, up.rows(left, columns), 0, width / SIDE,
                             [&](auto... part) {
                each_vector(part..., [&](Floats v, int64_t i, int64_t j) {
                    X* to = ds + i * width + j;
                    narrow(to, v + widen(to));
                });
            });
        }
        norm(ds - before, middle, dx, middle_beta, middle_b);
        multiply_rows<X>(of_width, count, out, 0, width / SIDE, [&](auto... part) {
            each_vector(part..., [&](Floats v, int64_t i, int64_t j) {
                narrow(dout + (first + i) * width + j, v);
            });
        });
    });
    end_beta.finish(sums_out[0]);
    end_b.finish(sums_out[1]);
    up_b.finish(sums_out[2]);
    middle_beta.finish(sums_out[3]);
    middle_b.finish(sums_out[4]);
}

// ---------------------------------------------------------------------------------- attention

// 16 x 16 words, rows to columns.
inline void transpose(const void* from, int64_t stride, void* to, int64_t to_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
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

// One step of a right operand: 32 rows of 32 columns, the numbers of two rows next to each other.
inline void interleave(const bf16* from, int64_t stride, bf16* to) {
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

// One head of one sequence, its rows copied, with zeros up to a multiple of 32.
template <class X>
struct Head {
    const int64_t padded, size, plane;
    bf16 *rows, *other;

    Head(const X* from, int64_t stride, int64_t count, int64_t size, Scratch& scratch)
        : padded(whole(count) * SIDE),
          size(size),
          plane(padded * size),
          rows(scratch.take<bf16>(PLANES<X> * plane)),
          other(scratch.take<bf16>(PLANES<X> * plane)) {
        for (int64_t i = 0; i < padded; i++)
            for (int64_t j = 0; j < size; j += LANES)
                copy_parts(i < count ? from + i * stride + j : nullptr, rows + i * size + j, plane);
    }

    Operand from(int64_t row) const { return {rows + row * size, plane}; }

    // The right operand that its transpose is: [size, padded].
    Operand transposed() {
        each_plane([&](const bf16* rows, bf16* other) {
            for (int64_t i = 0; i < padded; i += 16)
                for (int64_t j = 0; j < size; j += SIDE)
                    transpose(rows + i * size + j, size * sizeof(bf16),
                              other + i / SIDE * SIDE * size + j * SIDE + i % SIDE * SIDE, 64);
        });
        return {other, plane};
    }

    // The right operand that it is: [padded, size].
    Operand plain() {
        each_plane([&](const bf16* rows, bf16* other) {
            for (int64_t j = 0; j < size; j += SIDE)
                for (int64_t i = 0; i < padded; i += SIDE)
                    interleave(rows + i * size + j, size, other + j * padded + i * SIDE);
        });
        return {other, plane};
    }

    // The left operand that its transpose is: [size, padded], row by row.
    Operand transposed_rows() {
        alignas(64) bf16 step[PART];
        each_plane([&](const bf16* rows, bf16* other) {
            for (int64_t i = 0; i < padded; i += SIDE)
                for (int64_t j = 0; j < size; j += SIDE) {
                    interleave(rows + i * size + j, size, step);
                    for (int half = 0; half < 2; half++)
                        transpose(step + half * HALF, 64,
                                  other + (j + 16 * half) * padded + i, padded * sizeof(bf16));
                }
        });
        return {other, plane};
    }

  private:
    template <class Work>
    void each_plane(Work work) {
        for (int i = 0; i < PLANES<X>; i++) work(rows + i * plane, other + i * plane);
    }
};

// Rows of probabilities, or of what follows from them: 32 queries, some keys.
template <class X>
struct Block {
    const int64_t keys;
    X* wide;
    bf16* parts;

    Block(int64_t keys, Scratch& scratch)
        : keys(keys),
          wide(PLANES<X> > 1 ? scratch.take<X>(SIDE * keys) : nullptr),
          parts(scratch.take<bf16>(PLANES<X> * SIDE * keys)) {
        if constexpr (PLANES<X> == 1) wide = parts;
    }

    X* row(int64_t i) { return wide + i * keys; }

    // The left operand that it is.
    Operand left() {
        if constexpr (PLANES<X> > 1)
            for (int64_t j = 0; j < SIDE * keys; j += LANES)
                split<X>(parts + j, SIDE * keys, widen(wide + j));
        return {parts, SIDE * keys};
    }

    // Rows `first` and on of the right operand of `depth` rows that it is a part of.
    void interleave_into(bf16* panels, int64_t depth, int64_t first) const {
        for (int i = 0; i < PLANES<X>; i++)
            for (int64_t j = 0; j < keys; j += SIDE)
                interleave(parts + i * SIDE * keys + j, keys,
                           panels + i * depth * keys + j * depth + first * SIDE);
    }
};

struct Attention {
    int64_t q_stride, k_stride, v_stride;  // from token to token; heads lie side by side
    const int32_t *starts_q, *starts_k;    // [sequences + 1]
    int64_t sequences, heads, size;
    const float* bias;  // [heads, *, *] with these strides, or null
    int64_t bias_head, bias_query;
    float scale;
};

// Calls work(first query, queries, first key, keys, head, mask, scratch) for each head of each
// sequence, with scratch of bytes(most queries, most keys), both multiples of 32.
template <class Bytes, class Work>
void each_head(const Attention& a, const Dropout& like, int threads, Bytes bytes, Work work) {
    int64_t queries = 0, keys = 0;
    for (int64_t n = 0; n < a.sequences; n++) {
        queries = std::max<int64_t>(queries, a.starts_q[n + 1] - a.starts_q[n]);
        keys = std::max<int64_t>(keys, a.starts_k[n + 1] - a.starts_k[n]);
    }
    const int64_t most_q = whole(queries) * SIDE, most_k = whole(keys) * SIDE;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Scratch scratch(bytes(most_q, most_k));
        Mask drop(like, most_k);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a.sequences * a.heads; i++) {
            const int64_t n = i / a.heads;
            scratch.used = 0;
            work(a.starts_q[n], a.starts_q[n + 1] - a.starts_q[n], a.starts_k[n],
                 a.starts_k[n + 1] - a.starts_k[n], i % a.heads, drop, scratch);
        }
    }
}

template <class X>
void attention_fwd(const X* q, const X* k, const X* v, X* o, const Attention& a,
                   const Dropout& like, int threads) {
    const auto bytes = [&](int64_t queries, int64_t keys) {
        return PLANES<X> * (4 * (queries + 2 * keys) * a.size + 2 * SIDE * keys) +
               (4 + sizeof(X)) * SIDE * keys + 8 * keys + 4 * PART + 1024;
    };
    each_head(a, like, threads, bytes, [&](int64_t q0, int64_t queries, int64_t k0, int64_t keys,
                                           int64_t h, Mask& drop, Scratch& scratch) {
        const int64_t at = h * a.size;
        Head<X> query(q + q0 * a.q_stride + at, a.q_stride, queries, a.size, scratch);
        Head<X> key(k + k0 * a.k_stride + at, a.k_stride, keys, a.size, scratch);
        Head<X> value(v + k0 * a.v_stride + at, a.v_stride, keys, a.size, scratch);
        const Operand key_panels = key.transposed(), value_panels = value.plain();
        const int64_t padded = key.padded;
        float* scores = scratch.take<float>(SIDE * padded);
        float *row = scratch.take<float>(2 * padded), *part = scratch.take<float>(PART);
        Block<X> p(padded, scratch);
        for (int64_t first = 0; first < queries; first += SIDE) {
            const int64_t count = std::min<int64_t>(SIDE, queries - first);
            for (int64_t j = 0; j < padded; j += SIDE)
                multiply<X>(plain_rows(query.from(first), a.size), key_panels + j * a.size,
                            a.size / SIDE, scores + j, padded);
            for (int64_t i = 0; i < SIDE; i++) {
                if (i >= count) {
                    clear(p.row(i), 0, padded);
                    continue;
                }
                const float* bias =
                    a.bias ? a.bias + h * a.bias_head + (first + i) * a.bias_query : nullptr;
                if (like.threshold) drop.row((q0 + first + i) * a.heads + h, keys);
                softmax_row<float, X>(scores + i * padded, nullptr, p.row(i), nullptr, keys,
                                      padded, a.scale, bias, drop, row);
            }
            const Operand left = p.left();
            for (int64_t j = 0; j < a.size; j += SIDE) {
                multiply<X>(plain_rows(left, padded), value_panels + j * padded, padded / SIDE,
                            part);
                each_vector(part, q0 + first, count, at + j,
                            [&](Floats x, int64_t i, int64_t column) {
                                narrow(o + i * a.heads * a.size + column, x);
                            });
            }
        }
    });
}

// to[i] = (rows^T x panels)[:, i], the gradients of keys or values.
template <class X>
void transposed_product(Operand rows, Operand panels, int64_t depth, int64_t size, int64_t count,
                        X* to, int64_t stride) {
    alignas(64) float part[PART], turned[PART];
    for (int64_t first = 0; first < count; first += SIDE)
        for (int64_t j = 0; j < size; j += SIDE) {
            multiply<X>(plain_rows(rows + j * depth, depth), panels + first * depth, depth / SIDE,
                        part);
            for (int i = 0; i < SIDE; i += 16)
                for (int k = 0; k < SIDE; k += 16)
                    transpose(part + i * SIDE + k, SIDE * sizeof(float), turned + k * SIDE + i,
                              SIDE * sizeof(float));
            each_vector(turned, first, std::min<int64_t>(SIDE, count - first), j,
                        [&](Floats x, int64_t i, int64_t column) {
                            narrow(to + i * stride + column, x);
                        });
        }
}

// `dk` and `dv` may be null; the strides of all gradients are from token to token.
template <class X>
void attention_bwd(const X* dout, const X* q, const X* k, const X* v, X* dq, int64_t dq_stride,
                   X* dk, X* dv, int64_t dkv_stride, const Attention& a, const Dropout& like,
                   int threads) {
    const auto bytes = [&](int64_t queries, int64_t keys) {
        return 2 * PLANES<X> * ((4 * queries + 5 * keys) * a.size + 2 * SIDE * keys +
                                (dk ? 2 * queries * keys : 0)) +
               (8 + 2 * sizeof(X)) * SIDE * keys + 8 * keys + 4 * PART + 2048;
    };
    each_head(a, like, threads, bytes, [&](int64_t q0, int64_t queries, int64_t k0, int64_t keys,
                                           int64_t h, Mask& drop, Scratch& scratch) {
        const int64_t at = h * a.size;
        Head<X> query(q + q0 * a.q_stride + at, a.q_stride, queries, a.size, scratch);
        Head<X> above(dout + q0 * a.heads * a.size + at, a.heads * a.size, queries, a.size,
                      scratch);
        Head<X> key(k + k0 * a.k_stride + at, a.k_stride, keys, a.size, scratch);
        Head<X> value(v + k0 * a.v_stride + at, a.v_stride, keys, a.size, scratch);
        const int64_t padded = key.padded, depth = query.padded;
        bf16* plain_key = scratch.take<bf16>(PLANES<X> * key.plane);
        std::memcpy(plain_key, key.plain().data, PLANES<X> * key.plane * sizeof(bf16));
        const Operand plain_panels{plain_key, key.plane};
        const Operand key_panels = key.transposed(), value_panels = value.transposed();
        float* scores = scratch.take<float>(SIDE * padded);
        float* gradients = scratch.take<float>(SIDE * padded);
        float *row = scratch.take<float>(2 * padded), *part = scratch.take<float>(PART);
        Block<X> p(padded, scratch), ds(padded, scratch);
        bf16* p_panels = scratch.take<bf16>(dk ? PLANES<X> * depth * padded : 0);
        bf16* ds_panels = scratch.take<bf16>(dk ? PLANES<X> * depth * padded : 0);
        for (int64_t first = 0; first < queries; first += SIDE) {
            const int64_t count = std::min<int64_t>(SIDE, queries - first);
            for (int64_t j = 0; j < padded; j += SIDE) {
                multiply<X>(plain_rows(query.from(first), a.size), key_panels + j * a.size,
                            a.size / SIDE, scores + j, padded);
                multiply<X>(plain_rows(above.from(first), a.size), value_panels + j * a.size,
                            a.size / SIDE, gradients + j, padded);
            }
            for (int64_t i = 0; i < SIDE; i++) {
                if (i >= count) {
                    clear(p.row(i), 0, padded);
                    clear(ds.row(i), 0, padded);
                    continue;
                }
                const float* bias =
                    a.bias ? a.bias + h * a.bias_head + (first + i) * a.bias_query : nullptr;
                if (like.threshold) drop.row((q0 + first + i) * a.heads + h, keys);
                softmax_row(scores + i * padded, gradients + i * padded, p.row(i), ds.row(i),
                            keys, padded, a.scale, bias, drop, row);
            }
            const Operand left = ds.left();
            for (int64_t j = 0; j < a.size; j += SIDE) {
                multiply<X>(plain_rows(left, padded), plain_panels + j * padded, padded / SIDE,
                            part);
                each_vector(part, q0 + first, count, at + j,
                            [&](Floats x, int64_t i, int64_t column) {
                                narrow(dq + i * dq_stride + column, x);
                            });
            }
            if (dk) {
                p.left();
                p.interleave_into(p_panels, depth, first);
                ds.interleave_into(ds_panels, depth, first);
            }
        }
        if (dk) {
            transposed_product(query.transposed_rows(), {ds_panels, depth * padded}, depth, a.size,
                               keys, dk + k0 * dkv_stride + at, dkv_stride);
            transposed_product(above.transposed_rows(), {p_panels, depth * padded}, depth, a.size,
                               keys, dv + k0 * dkv_stride + at, dkv_stride);
        }
    });
}

}  // namespace
#endif
