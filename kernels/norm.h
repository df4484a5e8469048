// The LayerNorm at a junction, row by row: bias, dropout, residual, and the way back.
#pragma once

#include "vectors.h"

namespace {

// ---------------------------------------------------------------------------------- LayerNorm

// y = LayerNorm(residual + dropout(x + b)); what is null is left out. The sum goes to `sum`, the
// normalised rows to `xhat`.
template <class X, class R, class Y, class H = Y>
struct LayerNorm {
    const X* x;
    int64_t stride;
    const float* b;
    const R* residual;
    int64_t residual_stride;
    const float *gamma, *beta;
    Y *y, *sum;
    H* xhat;
    float *mean_out, *rstd_out;
    int64_t columns;
    double eps;
    Dropout like;

    void operator()(int64_t first, int64_t last) const {
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
            Y* out = y + i * columns;
            H* hat = xhat ? xhat + i * columns : nullptr;
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
    }
};

// `kept` is xhat, or with `mean` what was normalised. dx is written only where it is not ds.
template <class X, class R, class Y, class D = Y>
struct LayerNormBwd {
    const D* dy;
    int64_t stride;
    const Y* kept;
    int64_t kept_stride;
    const float *mean, *rstd, *gamma;
    const Y* dsum;
    int64_t dsum_stride;
    R* ds;
    X* dx;
    int64_t columns;
    Dropout like;

    // The rows of one block, whose sums over tokens go where they are wanted.
    void operator()(int64_t first, int64_t last, float* beta_sum, float* b_sum,
                    float* gamma_sum) const {
        Mask drop(like, columns);
        Buffer<float> buffer(2 * room(columns));
        float *t = buffer.data, *hat = t + room(columns);
        const float* weight = gamma;
        const bool normalise = mean;
        for (int64_t i = first; i < last; i++) {
            const D* from = dy + i * stride;
            const Y* row = kept + i * kept_stride;
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
    }
};

}  // namespace
