// Layers of a post-norm encoder in one call, one after the other. With short batches, to call each
// part of each layer takes as long as a good part of what they do.
#pragma once

#include "heads.h"
#include "tiles.h"

#ifdef BITFIT_TILES

namespace {

// A layer: its weights, packed for the pass, and what belongs to it in this batch. The last layer
// may compute first tokens only: then `q` is there, and `qkv` of keys and values alone.
template <class X>
struct Layer {
    const Weight *q, *qkv, *out, *up, *down;
    const float *q_b, *qkv_b, *up_b;
    X *q_rows, *qkv_rows;  // [first tokens, heads, size] and [tokens, 3 or 2, heads, size]
    Junction<X> middle, end;
    Slopes slopes;
    // attention's dropout
    int threshold;
    float scale;
    int64_t seed;
    // of the backward pass: sums as `layer_end_bwd` gives them, and those of the gradients of q, k
    // and v; what is not wanted is null
    float *ends[5], *sums[3];

    Dropout drop(int rounds) const { return {threshold, scale, seed, rounds}; }
};

// What the layers have in common. `o`, `spare` and `firsts` are scratch: of the size of all tokens,
// of twice that, and of a row for each sequence. What goes from layer to layer is in fp32.
template <class X>
struct Through {
    int64_t count, tokens, heads, size;
    const int32_t *starts, *each;  // where a sequence's tokens begin, and where its first ones do
    int64_t sequences, first_tokens;
    const float* bias;
    int64_t bias_head, bias_query;
    float factor;
    const float* x;
    X* o;
    float *spare, *firsts, *y;
    int rounds, threads;

    int64_t width() const { return heads * size; }

    // What a layer gives, of those that are left: the last one gives y.
    float* out_of(int64_t left) const {
        return left == 1 ? y : spare + left % 2 * tokens * width();
    }

    // Attention where a token's keys are `stride` numbers behind those of the one before.
    Attention attention(bool of_first, int64_t stride) const {
        return {of_first ? width() : stride, stride, stride, of_first ? each : starts, starts,
                sequences, heads, size, bias, bias_head, bias_query, factor};
    }
};

template <class Act, class X>
void layers_fwd(const Layer<X>* layers, const Through<X>& t) {
    const int64_t width = t.width();
    const float* x = t.x;
    for (int64_t i = 0; i < t.count; i++) {
        const Layer<X>& l = layers[i];
        const int64_t stride = l.qkv->columns, rows = l.q ? t.first_tokens : t.tokens;
        float* y = t.out_of(t.count - i);
        X* k = l.q ? l.qkv_rows : l.qkv_rows + width;
        linear<X>(x, width, *l.qkv, l.qkv_b, l.qkv_rows, false, t.tokens, t.threads);
        if (l.q) {
            for (int64_t n = 0; n < rows; n++)
                std::memcpy(t.firsts + n * width, x + t.starts[n] * width, width * sizeof(float));
            x = t.firsts;
            linear<X>(x, width, *l.q, l.q_b, l.q_rows, false, rows, t.threads);
        }
        attention_fwd<X>(l.q ? l.q_rows : l.qkv_rows, k, k + width, t.o,
                         t.attention(l.q, stride), l.drop(t.rounds), t.threads);
        layer_end<Act>(t.o, x, *l.out, l.middle, *l.up, l.up_b, l.slopes, *l.down, l.end, y, rows,
                       t.rounds, t.threads);
        x = y;
    }
}

// From the last layer to the first, as they lie; x and y are gradients, and `dqkv` is scratch of
// three times the size of all tokens.
template <class Act, class X>
void layers_bwd(const Layer<X>* layers, const Through<X>& t, X* dqkv) {
    const int64_t width = t.width();
    const float* dy = t.x;
    for (int64_t i = 0; i < t.count; i++) {
        const Layer<X>& l = layers[i];
        const int64_t stride = l.qkv->depth, rows = l.q ? t.first_tokens : t.tokens;
        const int64_t q_stride = l.q ? width : stride;
        const X *q = l.q ? l.q_rows : l.qkv_rows, *k = l.qkv_rows + (l.q ? 0 : width);
        float *dx = t.out_of(t.count - i), *of_rows = l.q ? t.firsts : dx;
        X *dq = l.q ? dqkv + t.tokens * stride : dqkv, *dk = l.q ? dqkv : dqkv + width;
        layer_end_bwd<Act>(dy, *l.out, l.middle, *l.up, l.up_b, l.slopes, *l.down, l.end, t.o,
                           of_rows, l.ends, rows, t.rounds, t.threads);
        attention_bwd<X>(t.o, q, k, k + width, dq, q_stride, dk, dk + width, stride,
                         t.attention(l.q, stride), l.drop(t.rounds), t.threads);
        const X* parts[] = {dq, dk, dk + width};
        for (int n = 0; n < 3; n++)
            if (l.sums[n])
                column_sum(parts[n], n ? stride : q_stride, l.sums[n], n ? t.tokens : rows, width,
                           Dropout{0, 1.0f, 0, t.rounds}, t.threads);
        linear<X>(dqkv, stride, *l.qkv, nullptr, dx, !l.q, t.tokens, t.threads);
        if (l.q) {
            linear<X>(dq, width, *l.q, nullptr, of_rows, true, rows, t.threads);
            for (int64_t n = 0; n < rows; n++) {
                float* to = dx + t.starts[n] * width;
                const float* from = of_rows + n * width;
                for (int64_t j = 0; j < width; j += LANES)
                    narrow(to + j, widen(to + j) + widen(from + j));
            }
        }
        dy = dx;
    }
}

}  // namespace
#endif
