// Layers of a post-norm encoder in one call, one after the other. With short batches, to call each
// part of each layer takes as long as a good part of what they do.
#pragma once

#include "heads.h"
#include "tiles.h"

#ifdef BITFIT_TILES

namespace {

// A layer: its weights, packed for the pass, and what belongs to it in this batch.
template <class X>
struct Layer {
    const Weight *qkv, *out, *up, *down;
    const float *qkv_b, *up_b;
    X* qkv_rows;  // [tokens, 3, heads, size]
    Junction<X> middle, end;
    Slopes slopes;
    // attention's dropout
    int threshold;
    float scale;
    int64_t seed;
    // of the backward pass: sums as `layer_end_bwd` gives them, and one of some columns of the
    // gradients of q, k and v
    float* sums[5];
    float* qkv_sums;
    int64_t first_column, columns;

    Dropout drop(int rounds) const { return {threshold, scale, seed, rounds}; }
};

// What the layers have in common. `o` and `spare` are scratch of the size of x, which may be
// neither of them nor `y`.
template <class X>
struct Through {
    int64_t count, tokens, heads, size;
    const int32_t* starts;
    int64_t sequences;
    const float* bias;
    int64_t bias_head, bias_query;
    float factor;
    const X* x;
    X *o, *spare, *y;
    int rounds, threads;

    int64_t width() const { return heads * size; }

    // What a layer gives, by its number of those that are still to come: the last one gives y.
    X* out_of(int64_t left) const { return left % 2 ? y : spare; }

    Attention attention() const {
        const int64_t stride = 3 * width();
        return {stride, stride, stride, starts,    starts,     sequences,
                heads,  size,   bias,   bias_head, bias_query, factor};
    }
};

template <class Act, class X>
void layers_fwd(const Layer<X>* layers, const Through<X>& t) {
    const int64_t width = t.width();
    const X* x = t.x;
    for (int64_t i = 0; i < t.count; i++) {
        const Layer<X>& l = layers[i];
        X *y = t.out_of(t.count - i), *q = l.qkv_rows;
        linear(x, width, *l.qkv, l.qkv_b, q, false, t.tokens, t.threads);
        attention_fwd<X>(q, q + width, q + 2 * width, t.o, t.attention(), l.drop(t.rounds),
                         t.threads);
        layer_end<Act, X>(t.o, x, *l.out, l.middle, *l.up, l.up_b, l.slopes, *l.down, l.end, y,
                          t.tokens, t.rounds, t.threads);
        x = y;
    }
}

// From the last layer to the first, as they lie; x and y are gradients, and `dqkv` is scratch of
// three times their size.
template <class Act, class X>
void layers_bwd(const Layer<X>* layers, const Through<X>& t, X* dqkv) {
    const int64_t width = t.width(), stride = 3 * width;
    const X* dy = t.x;
    for (int64_t i = 0; i < t.count; i++) {
        const Layer<X>& l = layers[i];
        X *dx = t.out_of(t.count - i), *q = l.qkv_rows;
        layer_end_bwd<Act, X>(dy, *l.out, l.middle, *l.up, l.up_b, l.slopes, *l.down, l.end, t.o,
                              dx, l.sums, t.tokens, t.rounds, t.threads);
        attention_bwd<X>(t.o, q, q + width, q + 2 * width, dqkv, stride, dqkv + width,
                         dqkv + 2 * width, stride, t.attention(), l.drop(t.rounds), t.threads);
        if (l.qkv_sums)
            column_sum(dqkv + l.first_column, stride, l.qkv_sums, t.tokens, l.columns,
                       Dropout{0, 1.0f, 0, t.rounds}, t.threads);
        linear(dqkv, stride, *l.qkv, nullptr, dx, true, t.tokens, t.threads);
        dy = dx;
    }
}

}  // namespace
#endif
