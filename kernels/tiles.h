// Products with frozen weights, and all of a layer that is not attention, 32 x 32 numbers at a
// time.
//
// A weight never changes, so it is packed once, for the forward and for the backward pass: panels
// of 32 columns, in each the steps one after the other, in the order in which they are loaded. What
// follows a product, bias, residual, activation and sums over tokens, is done on each 32 x 32
// numbers of it while they are in the first-level cache.
#pragma once

#include "norm.h"
#include "units.h"

#ifdef BITFIT_TILES

namespace {

constexpr int64_t PANELS = CACHE * 3 / 8;  // bytes of a weight that the second-level cache keeps
// Blocks of 32 rows that a thread works on at once: a weight passes through its cache once for all
// of them. Of wide layers these are more than that cache holds, but the rows of a product are read
// again from the next one as fast as they are multiplied, and a weight, which is larger, is not.
constexpr int64_t BLOCKS = 8;
inline int64_t blocks_at_once(int64_t blocks) {
    return std::max<int64_t>(1, std::min(BLOCKS, blocks));
}
constexpr int64_t SLICE = 384;

// How deep a product is at a time: the rows that a thread works on stay in its cache, where every
// panel of the weight meets them. In even parts, of multiples of 32.
template <class X>
inline int64_t depth_at_once(int64_t depth) {
    const int64_t most = CACHE * 3 / 4 / (BLOCKS * SIDE * BYTES<X>);
    const int64_t parts = (depth + most - 1) / most;
    return whole((depth + parts - 1) / parts) * SIDE;
}

static_assert(BLOCK == SIDE, "sums over tokens are taken in the same blocks");

// A right operand [depth, columns], where the numbers of a column are `row` apart and those of a
// row `column`; both sizes are multiples of 32. Its planes lie one after the other.
template <class X>
void pack(const X* from, int64_t row, int64_t column, int64_t depth, int64_t columns, Stored<X>* to,
          int threads) {
    using P = Stored<X>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < columns / SIDE; panel++) {
        const X* first = from + panel * SIDE * column;
        alignas(64) P step[PLANES<X> * PART], numbers[PLANES<X> * LANES];
        for (int64_t k = 0; k < depth; k += SIDE) {
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j += LANES) {
                    X some[LANES];
                    for (int l = 0; l < LANES; l++)
                        some[l] = first[(k + i) * row + (j + l) * column];
                    copy_parts<X>(some, numbers, LANES);
                    for (int part = 0; part < PLANES<X>; part++)
                        for (int l = 0; l < LANES; l++)
                            step[part * PART + place<P>(i, j + l)] = numbers[part * LANES + l];
                }
            P* out = to + panel * depth * SIDE + k * SIDE;
            for (int part = 0; part < PLANES<X>; part++)
                std::memcpy(out + part * depth * columns, step + part * PART, PART * sizeof(P));
        }
    }
}

// Where column j of row i lies in a left operand.
inline int64_t gathered_at(int64_t i, int64_t j, int64_t depth) {
    return i / SIDE * SIDE * depth + j / SIDE * PART + i % SIDE * SIDE + j % SIDE;
}

// Rows as a left operand, block by block of 32; zeros stand behind the last.
template <class X, class From>
void gather_rows(const From* from, int64_t stride, int64_t count, int64_t depth, Number<X>* to,
                 int64_t plane) {
    for (int64_t i = 0; i < whole(count) * SIDE; i++) {
        const From* row = i < count ? from + i * stride : nullptr;
        for (int64_t k = 0; k < depth; k += LANES)
            copy_parts<X>(row ? row + k : nullptr, to + gathered_at(i, k, depth), plane);
    }
}

// A packed weight [depth, columns], whose panels are `panel` numbers apart.
struct Weight {
    const void* data;
    int64_t panel, depth, columns, plane;

    template <class P>
    Operand<P> panels() const {
        return {static_cast<const P*>(data), plane};
    }

    // Some of its rows, from a multiple of 32 on.
    template <class P>
    Weight rows(int64_t first, int64_t count) const {
        return {static_cast<const P*>(data) + first * SIDE, panel, count, columns, plane};
    }
};

// Calls done(numbers, first row, rows, first column), 32 columns and any number of rows at a time,
// for gathered rows times some panels of a weight; it may write to the numbers. That is done for
// one part while the next is multiplied.
template <class X, class Done>
void multiply_rows(Operand<Number<X>> gathered, int64_t count, const Weight& weight,
                   int64_t first_panel, int64_t last_panel, Done done) {
    const int64_t steps = weight.depth / SIDE, rows_a_step = (SIDE + steps - 1) / steps;
    const int64_t at_once = std::max<int64_t>(1, PANELS / (weight.depth * SIDE * STORED_BYTES<X>));
    const auto panels = weight.panels<Stored<X>>();
    alignas(64) float parts[2 * PART];
    float *now = parts, *before = parts + PART;
    int64_t row = 0, rows = 0, column = 0;  // of the part before
    const auto finish = [&](int64_t from, int64_t to) {
        to = std::min(to, rows);
        if (from < to) done(before + from * SIDE, row + from, to - from, column);
    };
    for (int64_t p = first_panel; p < last_panel; p += at_once) {
        for (int64_t i = 0; i < count; i += SIDE) {
            const int64_t some = std::min<int64_t>(SIDE, count - i);
            for (int64_t q = p; q < std::min(last_panel, p + at_once); q++) {
                // later rows find the panels in the cache
                const bool fetches = !i && q + 1 < std::min(last_panel, p + at_once);
                multiply<X>(packed_rows(gathered + i * weight.depth, some),
                            panels + q * weight.panel, steps, now, SIDE,
                            fetches ? panels[0] + (q + 1) * weight.panel : nullptr,
                            [&](int64_t step) {
                                finish(step * rows_a_step, (step + 1) * rows_a_step);
                            });
                std::swap(now, before);
                row = i, rows = some, column = q * SIDE;
            }
        }
    }
    finish(0, SIDE);
}

// Calls done(numbers, first row, rows, first column) for x times a packed weight.
template <class X, class From, class Done>
void product(const From* x, int64_t stride, const Weight& weight, int64_t rows, int threads,
             Done done) {
    const int64_t blocks = whole(rows), panels = weight.columns / SIDE;
    const int64_t down = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
    const int64_t across = std::max<int64_t>(1, std::min<int64_t>(threads / down, panels));
    const int64_t chunk = blocks_at_once(blocks), deep = depth_at_once<X>(weight.depth);
    const int64_t plane = chunk * SIDE * deep;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < down * across; part++) {
        [[maybe_unused]] Units units;
        const int64_t left = panels * (part % across) / across;
        const int64_t right = panels * (part % across + 1) / across;
        const int64_t width = (right - left) * SIDE;
        Buffer<Number<X>> gathered(plane * PLANES<X>);
        Buffer<float> sums(deep < weight.depth ? chunk * SIDE * width : 0);
        const int64_t last = blocks * (part / across + 1) / down;
        for (int64_t i = blocks * (part / across) / down; i < last; i += chunk) {
            const int64_t first = i * SIDE;
            const int64_t count = std::min(rows, std::min(last, i + chunk) * SIDE) - first;
            for (int64_t k = 0; k < weight.depth; k += deep) {
                const int64_t some = std::min(deep, weight.depth - k);
                gather_rows<X>(x + first * stride + k, stride, count, some, gathered.data, plane);
                multiply_rows<X>({gathered.data, plane}, count,
                                 weight.rows<Stored<X>>(k, some), left, right,
                                 [&](float* numbers, int64_t row, int64_t n, int64_t column) {
                    const bool is_last = k + some == weight.depth;
                    float* kept = sums.data + row * width + column - left * SIDE;
                    if (deep < weight.depth)
                        each_vector(numbers, 0, n, 0, [&](Floats v, int64_t r, int64_t j) {
                            float* sum = kept + r * width + j;
                            if (k) v += widen(sum);
                            narrow(is_last ? numbers + r * SIDE + j : sum, v);
                        });
                    if (is_last) done(numbers, first + row, n, column);
                });
            }
        }
    }
}

// y = x W + b, or y += x W, with a weight of type X.
template <class X, class From, class To>
void linear(const From* x, int64_t stride, const Weight& weight, const float* b, To* y, bool onto,
            int64_t rows, int threads) {
    product<X>(x, stride, weight, rows, threads, [=](auto... part) {
        each_vector(part..., [=](Floats v, int64_t i, int64_t j) {
            To* to = y + i * weight.columns + j;
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
    product<X>(x, stride, weight, rows, threads, [=](auto... part) {
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
    product<X>(dy, stride, weight, rows, threads,
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

// Calls work(first row, rows, scratch) for pieces of some rows, of which a thread has one at a time.
template <class Work>
void each_chunk(int64_t rows, int64_t bytes_a_row, int threads, Work work) {
    const int64_t blocks = whole(rows), chunk = blocks_at_once(blocks);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < parts; part++) {
        [[maybe_unused]] Units units;
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

// How many columns of the feed-forward block there are at a time: all of them where operands are
// in bf16; wider ones would leave the cache before the next product reads them. Sums over such
// slices are in fp32.
template <class X>
inline int64_t columns_at_once(int64_t inner) {
    return BYTES<X> == sizeof(bf16) ? inner : std::min(inner, SLICE);
}

template <class X>
using SliceSum = std::conditional_t<BYTES<X> == sizeof(bf16), X, float>;

template <class X>
inline int64_t end_bytes(int64_t width, int64_t slice) {
    return BYTES<X> * (width + slice) + (sizeof(float) + sizeof(SliceSum<X>)) * width;
}

// y = LN(s + dropout(act(s W_up + b_up) W_down + b)), where s = LN(x + dropout(o W_out + b)): what
// a post-norm layer does behind attention, whose heads gave `o`, some rows at a time. What goes on
// from junction to junction is in fp32 inside of the layer, and of type R outside: to round it to
// bf16 would cost as much of the gradients' precision as all other rounding does.
template <class Act, class X, class R>
void layer_end(const X* o, const R* x, const Weight& out, const Junction<X>& middle,
               const Weight& up, const float* b, const Slopes& slopes, const Weight& down,
               const Junction<X>& end, R* y, int64_t rows, int rounds, int threads) {
    const int64_t width = out.columns, inner = up.columns, slice = columns_at_once<X>(inner);
    each_chunk(rows, end_bytes<X>(width, slice), threads,
               [&](int64_t first, int64_t count, Scratch& scratch) {
        const int64_t size = whole(count) * SIDE;
        auto* gathered = scratch.take<Number<X>>(PLANES<X> * size * width);
        auto* h = scratch.take<Number<X>>(PLANES<X> * size * slice);
        auto* z = scratch.take<SliceSum<X>>(size * width);
        auto* s = scratch.take<float>(size * width);
        const Operand<Number<X>> of_width{gathered, size * width}, of_slice{h, size * slice};
        bool onto = false;
        const auto keep_rows = [&](auto... part) {
            each_vector(part..., [&](Floats v, int64_t i, int64_t j) {
                if (onto) v += widen(z + i * width + j);
                narrow(z + i * width + j, v);
            });
        };
        // rows are numbered as in the whole batch, by which dropout goes
        const int64_t before = first * width;
        gather_rows<X>(o + before, width, count, width, gathered, of_width.plane);
        multiply_rows<X>(of_width, count, out, 0, width / SIDE, keep_rows);
        LayerNorm<SliceSum<X>, R, float, X>{
            z - before, width, middle.b, x, width, middle.gamma, middle.beta, s - before, nullptr,
            middle.xhat, nullptr, middle.rstd, width, middle.eps,
            middle.drop(rounds)}(first, first + count);
        gather_rows<X>(s, width, count, width, gathered, of_width.plane);
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
            multiply_rows<X>(of_slice, count, down.rows<Stored<X>>(left, some), 0, width / SIDE,
                             keep_rows);
            onto = true;
        }
        LayerNorm<SliceSum<X>, float, R, X>{
            z - before, width, end.b, s - before, width, end.gamma, end.beta, y, nullptr, end.xhat,
            nullptr, end.rstd, width, end.eps, end.drop(rounds)}(first, first + count);
    });
}

// The gradients of o and x, by weights packed for the backward pass, and those of the biases: of
// the end's beta and b, of b_up, and of the middle's beta and b.
template <class Act, class X, class R>
void layer_end_bwd(const R* dy, const Weight& out, const Junction<X>& middle, const Weight& up,
                   const float* b, const Slopes& slopes, const Weight& down,
                   const Junction<X>& end, X* dout, R* dx, float* const* sums_out, int64_t rows,
                   int rounds, int threads) {
    const int64_t width = out.columns, inner = down.columns, slice = columns_at_once<X>(inner);
    Sums end_beta(sums_out[0], rows, width), end_b(sums_out[1], rows, width);
    Sums up_b(sums_out[2], rows, inner);
    Sums middle_beta(sums_out[3], rows, width), middle_b(sums_out[4], rows, width);
    each_chunk(rows, end_bytes<X>(width, slice), threads,
               [&](int64_t first, int64_t count, Scratch& scratch) {
        const int64_t size = whole(count) * SIDE, before = first * width;
        auto* gathered = scratch.take<Number<X>>(PLANES<X> * size * width);
        auto* du = scratch.take<Number<X>>(PLANES<X> * size * slice);
        auto* ds = scratch.take<float>(size * width);
        X* dz = scratch.take<X>(size * width);
        const Operand<Number<X>> of_width{gathered, size * width}, of_slice{du, size * slice};
        const auto norm = [&](const auto* from, const Junction<X>& at, auto* to, Sums& beta,
                              Sums& bias) {
            using From = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
            using To = std::remove_pointer_t<decltype(to)>;
            const Dropout like = at.drop(rounds);
            LayerNormBwd<X, To, X, From> bwd{
                from,    width, at.xhat, width, nullptr, at.rstd,
                at.gamma, nullptr, 0, to, like.threshold ? dz - before : nullptr, width, like};
            for (int64_t i = first; i < first + count; i += SIDE)
                bwd(i, std::min(first + count, i + SIDE), beta.block(i / SIDE),
                    bias.block(i / SIDE), nullptr);
            if (like.threshold)
                gather_rows<X>(dz, width, count, width, gathered, of_width.plane);
            else
                gather_rows<X>(to + before, width, count, width, gathered, of_width.plane);
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
            multiply_rows<X>(of_slice, count, up.rows<Stored<X>>(left, columns), 0, width / SIDE,
                             [&](auto... part) {
                each_vector(part..., [&](Floats v, int64_t i, int64_t j) {
                    float* to = ds + i * width + j;
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

}  // namespace
#endif
