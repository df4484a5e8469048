// The pointwise passes of a BitFit step for CPUs: what the Triton kernels do on a GPU, with the
// same dropout masks. Plain C functions over raw pointers, built on first use by native.py.
#include "heads.h"
#include "layers.h"
#include "norm.h"
#include "tiles.h"
#include "vectors.h"

namespace {

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

// Scores become dropped-out probabilities, and `gradients`, theirs, become those of the scores.
template <class X>
void softmax(X* scores, X* gradients, const Group& g, const Dropout& like, int threads) {
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (int64_t n = 0; n < g.sequences; n++) {
        for (int64_t h = 0; h < g.heads; h++) {
            Mask drop(like, g.keys);
            Buffer<float> buffer(2 * room(g.keys));
            const int64_t length = g.lengths_k[n];
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
                softmax_row(row, gradient, row, gradient, length, g.keys, g.scale, bias, drop,
                            buffer.data);
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

// --------------------------------------------------------------------------------- embeddings

// y = dropout(LayerNorm(sum over t of tables[t][ids[t]])); all ids have their rows.
template <class Y>
void embedding_layer_norm(const float* const* tables, const int64_t* const* ids, int count,
                          const float* gamma, const float* beta, Y* y, int64_t rows,
                          int64_t columns, double eps, const Dropout& like, int threads) {
    each_block(rows, threads, [&](int64_t first, int64_t last, int64_t) {
        Mask drop(like, columns);
        Buffer<float> buffer(2 * BLOCK * columns);
        float *s = buffer.data, *hat = s + BLOCK * columns;
        for (int64_t i = first; i < last; i++)
            sweep(columns, [&](int64_t j, auto at) {
                Floats v = at.load(tables[0] + ids[0][i] * columns + j);
                for (int t = 1; t < count; t++) v += at.load(tables[t] + ids[t][i] * columns + j);
                at.store(s + (i - first) * columns + j, v);
            });
        LayerNorm<float, float, float>{s,       columns, nullptr, nullptr, 0,
                                       gamma,   beta,    hat,     nullptr, nullptr,
                                       nullptr, nullptr, columns, eps,     {}}(0, last - first);
        for (int64_t i = first; i < last; i++) {
            if (like.threshold) drop.row(i, columns);
            sweep(columns, [&](int64_t j, auto at) {
                Floats v = at.load(hat + (i - first) * columns + j);
                at.store(y + i * columns + j, like.threshold ? drop(v, j) : v);
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
        LayerNorm<X, R, Y> norm{of<X>(x), x_stride,  b,          of<R>(residual), r_stride,
                                gamma,    beta,      of<Y>(y),   of<Y>(sum),      of<Y>(xhat),
                                mean,     rstd,      columns,    eps,             drop};
        each_block(rows, threads, [&](int64_t first, int64_t last, int64_t) { norm(first, last); });
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
        LayerNormBwd<X, R, Y> norm{of<Y>(dy),    dy_stride,   of<Y>(kept), kept_stride, mean,
                                   rstd,         gamma,       of<Y>(dsum), dsum_stride,
                                   of<R>(ds),    of<X>(dx),   columns,     drop};
        Sums beta_sums(dbeta, rows, columns), b_sums(db, rows, columns);
        Sums gamma_sums(dgamma, rows, columns);
        each_block(rows, threads, [&](int64_t first, int64_t last, int64_t block) {
            norm(first, last, beta_sums.block(block), b_sums.block(block),
                 gamma_sums.block(block));
        });
        beta_sums.finish(dbeta);
        b_sums.finish(db);
        gamma_sums.finish(dgamma);
    }))
}

void bitfit_activation_fwd(int type, int act, void* x, int64_t stride, const float* b, void* h,
                           void* slope, uint8_t* levels, float low, float step, int64_t rows,
                           int64_t columns, int threads) {
    WITH_TYPE(type, X, with_activation(act, [&](auto a) {
        activation_fwd<decltype(a), X>(of<X>(x), stride, b, of<X>(h), of<X>(slope), levels, low,
                                       step, rows, columns, threads);
    }))
}

void bitfit_activation_bwd(int type, int act, void* dh, int64_t stride, void* kept,
                           int64_t kept_stride, int kind, const float* b, float low, float step,
                           void* dz, float* db, int64_t rows, int64_t columns, int threads) {
    WITH_TYPE(type, X, with_activation(act, [&](auto a) {
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

// `lacking` becomes the number of a table that has no row for one of its ids, and nothing is done.
void bitfit_embedding_layer_norm(int type, const float* const* tables, const int64_t* const* ids,
                                 const int64_t* sizes, int count, const float* gamma,
                                 const float* beta, void* y, int64_t rows, int64_t columns,
                                 double eps, int* lacking, int threshold, float scale,
                                 int64_t seed, int rounds, int threads) {
    for (int t = 0; t < count; t++)
        for (int64_t i = 0; i < rows; i++)
            if (ids[t][i] < 0 || ids[t][i] >= sizes[t]) {
                *lacking = t;
                return;
            }
    Dropout drop{threshold, scale, seed, rounds};
    WITH_TYPE(type, Y, {
        embedding_layer_norm<Y>(tables, ids, count, gamma, beta, of<Y>(y), rows, columns, eps, drop,
                                threads);
    })
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

int bitfit_lanes() { return LANES; }

int bitfit_has_tiles() {
#ifdef BITFIT_TILES
    return may_multiply();
#else
    return 0;
#endif
}

// Whether there would be, if Linux let the process use matrix units.
int bitfit_is_refused() {
#ifdef BITFIT_AMX
    return !may_multiply();
#else
    return 0;
#endif
}

int bitfit_has_matrix_units() {
#ifdef BITFIT_AMX
    return may_multiply();
#else
    return 0;
#endif
}

#ifdef BITFIT_TILES
// Numbers of which one in a packed weight is made up, bytes of each, and whether those of two rows
// stand next to each other.
void bitfit_layout(int type, int* planes, int* bytes, int* pairs) {
    WITH_TYPE(type, X, {
        *planes = PLANES<X>;
        *bytes = sizeof(Stored<X>);
        *pairs = place<Stored<X>>(1, 0) == 1;
    })
}

void bitfit_pack(int type, void* from, int64_t row, int64_t column, int64_t depth,
                 int64_t columns, void* to, int threads) {
    WITH_TYPE(type, X, {
        pack<X>(of<X>(from), row, column, depth, columns, of<Stored<X>>(to), threads);
    })
}

void bitfit_linear(int type, void* x, int64_t stride, const Weight* weight, const float* b,
                   void* y, int onto, int64_t rows, int threads) {
    WITH_TYPE(type, X, {
        linear<X>(of<X>(x), stride, *weight, b, of<X>(y), onto, rows, threads);
    })
}

void bitfit_linear_activation(int type, int act, void* x, int64_t stride, const Weight* weight,
                              const float* b, void* h, const Slopes* slopes, int64_t rows,
                              int threads) {
    WITH_TYPE(type, X, with_activation(act, [&](auto a) {
        linear_activation<decltype(a), X>(of<X>(x), stride, *weight, b, of<X>(h), *slopes, rows,
                                          threads);
    }))
}

void bitfit_linear_activation_bwd(int type, int act, void* dy, int64_t stride,
                                  const Weight* weight, const Slopes* slopes, const float* b,
                                  void* dz, float* db, int64_t rows, int threads) {
    WITH_TYPE(type, X, with_activation(act, [&](auto a) {
        linear_activation_bwd<decltype(a), X>(of<X>(dy), stride, *weight, *slopes, b, of<X>(dz),
                                              db, rows, threads);
    }))
}

void bitfit_layer_end(int type, int act, void* o, void* x, const Weight* out, const void* middle,
                      const Weight* up, const float* b, const Slopes* slopes, const Weight* down,
                      const void* end, void* y, int64_t rows, int rounds, int threads) {
    WITH_TYPE(type, X, with_activation(act, [&](auto a) {
        using At = const Junction<X>*;
        layer_end<decltype(a)>(of<X>(o), of<X>(x), *out, *At(middle), *up, b, *slopes, *down,
                               *At(end), of<X>(y), rows, rounds, threads);
    }))
}

void bitfit_layer_end_bwd(int type, int act, void* dy, const Weight* out, const void* middle,
                          const Weight* up, const float* b, const Slopes* slopes,
                          const Weight* down, const void* end, void* dout, void* dx,
                          float* end_beta, float* end_b, float* up_b, float* middle_beta,
                          float* middle_b, int64_t rows, int rounds, int threads) {
    float* const sums[] = {end_beta, end_b, up_b, middle_beta, middle_b};
    WITH_TYPE(type, X, with_activation(act, [&](auto a) {
        using At = const Junction<X>*;
        layer_end_bwd<decltype(a)>(of<X>(dy), *out, *At(middle), *up, b, *slopes, *down, *At(end),
                                   of<X>(dout), of<X>(dx), sums, rows, rounds, threads);
    }))
}

void bitfit_attention_fwd(int type, void* q, int64_t q_stride, void* k, int64_t k_stride, void* v,
                          int64_t v_stride, const int32_t* starts_q, const int32_t* starts_k,
                          int64_t sequences, int64_t heads, int64_t size, const float* bias,
                          int64_t bias_head, int64_t bias_query, float factor, void* o,
                          int threshold, float scale, int64_t seed, int rounds, int threads) {
    Dropout drop{threshold, scale, seed, rounds};
    Attention a{q_stride, k_stride, v_stride, starts_q,  starts_k,   sequences,
                heads,    size,     bias,     bias_head, bias_query, factor};
    WITH_TYPE(type, X, {
        attention_fwd<X>(of<X>(q), of<X>(k), of<X>(v), of<X>(o), a, drop, threads);
    })
}

void bitfit_attention_bwd(int type, void* q, int64_t q_stride, void* k, int64_t k_stride, void* v,
                          int64_t v_stride, const int32_t* starts_q, const int32_t* starts_k,
                          int64_t sequences, int64_t heads, int64_t size, const float* bias,
                          int64_t bias_head, int64_t bias_query, float factor, void* dout,
                          void* dq, int64_t dq_stride, void* dk, void* dv, int64_t dkv_stride,
                          int threshold, float scale, int64_t seed, int rounds, int threads) {
    Dropout drop{threshold, scale, seed, rounds};
    Attention a{q_stride, k_stride, v_stride, starts_q,  starts_k,   sequences,
                heads,    size,     bias,     bias_head, bias_query, factor};
    WITH_TYPE(type, X, {
        attention_bwd<X>(of<X>(dout), of<X>(q), of<X>(k), of<X>(v), of<X>(dq), dq_stride,
                         of<X>(dk), of<X>(dv), dkv_stride, a, drop, threads);
    })
}

void bitfit_layers_fwd(int type, int act, const void* layers, const void* through, int threads) {
    WITH_TYPE(type, X, with_activation(act, [&](auto a) {
        auto all = *static_cast<const Through<X>*>(through);
        all.threads = threads;
        layers_fwd<decltype(a), X>(static_cast<const Layer<X>*>(layers), all);
    }))
}

void bitfit_layers_bwd(int type, int act, const void* layers, const void* through, void* dqkv,
                       int threads) {
    WITH_TYPE(type, X, with_activation(act, [&](auto a) {
        auto all = *static_cast<const Through<X>*>(through);
        all.threads = threads;
        layers_bwd<decltype(a), X>(static_cast<const Layer<X>*>(layers), all, of<X>(dqkv));
    }))
}
#endif
}
