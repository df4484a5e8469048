// Attention, one head of one sequence at a time, in pieces of 32 queries and 32 keys.
#pragma once

#include <type_traits>

#include "units.h"

#ifdef BITFIT_TILES

namespace {

// One head of one sequence, its rows copied, with zeros up to a multiple of 32.
template <class X>
struct Head {
    using P = Number<X>;
    const int64_t padded, size, plane;
    P *rows, *other;

    Head(const X* from, int64_t stride, int64_t count, int64_t size, Scratch& scratch)
        : padded(whole(count) * SIDE),
          size(size),
          plane(padded * size),
          rows(scratch.take<P>(PLANES<X> * plane)),
          other(scratch.take<P>(PLANES<X> * plane)) {
        for (int64_t i = 0; i < padded; i++)
            for (int64_t j = 0; j < size; j += LANES)
                copy_parts<X>(i < count ? from + i * stride + j : nullptr, rows + i * size + j,
                              plane);
    }

    Operand<P> from(int64_t row) const { return {rows + row * size, plane}; }

    // The right operand that its transpose is: [size, padded].
    Operand<P> transposed() {
        return each_part([&](const P* part, P* to, int64_t i, int64_t j) {
            step_of_columns(part, size, to + i * size + j * SIDE);
        });
    }

    // The right operand that it is: [padded, size].
    Operand<P> plain() {
        return each_part([&](const P* part, P* to, int64_t i, int64_t j) {
            step_of_rows(part, size, to + j * padded + i * SIDE);
        });
    }

    // The left operand that its transpose is: [size, padded], row by row.
    Operand<P> transposed_rows() {
        return each_part([&](const P* part, P* to, int64_t i, int64_t j) {
            turn(part, size, to + j * padded + i, padded);
        });
    }

  private:
    // Calls work(32 x 32 numbers, where the plane goes, their row, their column).
    template <class Work>
    Operand<P> each_part(Work work) {
        for (int n = 0; n < PLANES<X>; n++)
            for (int64_t i = 0; i < padded; i += SIDE)
                for (int64_t j = 0; j < size; j += SIDE)
                    work(rows + n * plane + i * size + j, other + n * plane, i, j);
        return {other, plane};
    }
};

// Rows of probabilities, or of what follows from them: 32 queries, some keys.
template <class X>
struct Block {
    using P = Number<X>;
    // what is written: parts at once where there is one of a number
    using Wide = std::conditional_t<PLANES<X> == 1, P, X>;
    const int64_t keys;
    Wide* wide;
    P* parts;

    Block(int64_t keys, Scratch& scratch)
        : keys(keys),
          wide(scratch.take<Wide>(PLANES<X> > 1 ? SIDE * keys : 0)),
          parts(scratch.take<P>(PLANES<X> * SIDE * keys)) {
        if constexpr (PLANES<X> == 1) wide = parts;
    }

    Wide* row(int64_t i) { return wide + i * keys; }

    // The left operand that it is.
    Operand<P> left() {
        if constexpr (PLANES<X> > 1)
            for (int64_t j = 0; j < SIDE * keys; j += LANES)
                split<X>(parts + j, SIDE * keys, widen(wide + j));
        return {parts, SIDE * keys};
    }

    // Rows `first` and on of the right operand of `depth` rows that it is a part of.
    void write_panels(P* panels, int64_t depth, int64_t first) const {
        for (int i = 0; i < PLANES<X>; i++)
            for (int64_t j = 0; j < keys; j += SIDE)
                step_of_rows(parts + i * SIDE * keys + j, keys,
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
        [[maybe_unused]] Units units;
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
        return 2 * BYTES<X> * (queries + 2 * keys) * a.size + BYTES<X> * SIDE * keys +
               (4 + sizeof(X)) * SIDE * keys + 8 * keys + 4 * PART + 1024;
    };
    each_head(a, like, threads, bytes, [&](int64_t q0, int64_t queries, int64_t k0, int64_t keys,
                                           int64_t h, Mask& drop, Scratch& scratch) {
        const int64_t at = h * a.size;
        Head<X> query(q + q0 * a.q_stride + at, a.q_stride, queries, a.size, scratch);
        Head<X> key(k + k0 * a.k_stride + at, a.k_stride, keys, a.size, scratch);
        Head<X> value(v + k0 * a.v_stride + at, a.v_stride, keys, a.size, scratch);
        const auto key_panels = key.transposed(), value_panels = value.plain();
        const int64_t padded = key.padded;
        float* scores = scratch.take<float>(SIDE * padded);
        float *row = scratch.take<float>(2 * padded), *part = scratch.take<float>(PART);
        Block<X> p(padded, scratch);
        for (int64_t first = 0; first < queries; first += SIDE) {
            const int64_t count = std::min<int64_t>(SIDE, queries - first);
            for (int64_t j = 0; j < padded; j += SIDE)
                multiply<X>(plain_rows(query.from(first), a.size, count), key_panels + j * a.size,
                            a.size / SIDE, scores + j, padded);
            for (int64_t i = 0; i < SIDE; i++) {
                if (i >= count) {
                    clear(p.row(i), 0, padded);
                    continue;
                }
                const float* bias =
                    a.bias ? a.bias + h * a.bias_head + (first + i) * a.bias_query : nullptr;
                if (like.threshold) drop.row((q0 + first + i) * a.heads + h, keys);
                softmax_row<float, typename Block<X>::Wide>(scores + i * padded, nullptr, p.row(i),
                                                            nullptr, keys, padded, a.scale, bias,
                                                            drop, row);
            }
            const auto left = p.left();
            for (int64_t j = 0; j < a.size; j += SIDE) {
                multiply<X>(plain_rows(left, padded, count), value_panels + j * padded,
                            padded / SIDE, part);
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
void transposed_product(Operand<Number<X>> rows, Operand<Number<X>> panels, int64_t depth,
                        int64_t size, int64_t count, X* to, int64_t stride) {
    alignas(64) float part[PART], turned[PART];
    for (int64_t first = 0; first < count; first += SIDE)
        for (int64_t j = 0; j < size; j += SIDE) {
            multiply<X>(plain_rows(rows + j * depth, depth), panels + first * depth, depth / SIDE,
                        part);
            turn(part, SIDE, turned, SIDE);
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
        return BYTES<X> * ((4 * queries + 5 * keys) * a.size + 2 * SIDE * keys +
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
        auto* plain_key = scratch.take<Number<X>>(PLANES<X> * key.plane);
        std::memcpy(plain_key, key.plain().data, BYTES<X> * key.plane);
        const Operand<Number<X>> plain_panels{plain_key, key.plane};
        const auto key_panels = key.transposed(), value_panels = value.transposed();
        float* scores = scratch.take<float>(SIDE * padded);
        float* gradients = scratch.take<float>(SIDE * padded);
        float *row = scratch.take<float>(2 * padded), *part = scratch.take<float>(PART);
        Block<X> p(padded, scratch), ds(padded, scratch);
        auto* p_panels = scratch.take<Number<X>>(dk ? PLANES<X> * depth * padded : 0);
        auto* ds_panels = scratch.take<Number<X>>(dk ? PLANES<X> * depth * padded : 0);
        for (int64_t first = 0; first < queries; first += SIDE) {
            const int64_t count = std::min<int64_t>(SIDE, queries - first);
            for (int64_t j = 0; j < padded; j += SIDE) {
                multiply<X>(plain_rows(query.from(first), a.size, count), key_panels + j * a.size,
                            a.size / SIDE, scores + j, padded);
                multiply<X>(plain_rows(above.from(first), a.size, count), value_panels + j * a.size,
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
            const auto left = ds.left();
            for (int64_t j = 0; j < a.size; j += SIDE) {
                multiply<X>(plain_rows(left, padded, count), plain_panels + j * padded,
                            padded / SIDE, part);
                each_vector(part, q0 + first, count, at + j,
                            [&](Floats x, int64_t i, int64_t column) {
                                narrow(dq + i * dq_stride + column, x);
                            });
            }
            if (dk) {
                p.left();
                p.write_panels(p_panels, depth, first);
                ds.write_panels(ds_panels, depth, first);
            }
        }
        if (dk) {
            const Operand<Number<X>> of_keys{ds_panels, depth * padded};
            const Operand<Number<X>> of_values{p_panels, depth * padded};
            transposed_product(query.transposed_rows(), of_keys, depth, a.size, keys,
                               dk + k0 * dkv_stride + at, dkv_stride);
            transposed_product(above.transposed_rows(), of_values, depth, a.size, keys,
                               dv + k0 * dkv_stride + at, dkv_stride);
        }
    });
}

}  // namespace
#endif
