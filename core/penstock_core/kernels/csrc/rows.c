/* Row work between the matrix products: norms, rotary embedding with the write to the pages, gated activation.
 *
 * Each row is one task's alone and its sums run in a fixed order, so results do not depend on the batch.
 */
#include "simd.h"

#define SERIAL 16384 /* below this many numbers a parallel region costs more than it saves */

INLINE float inverse_rms(const float *x, int64_t size, float eps) {
    vf squares[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    int64_t i = 0;
    for (; i + 4 * VL <= size; i += 4 * VL)
        for (int j = 0; j < 4; j++) {
            const vf a = load(x + i + j * VL);
            squares[j] = fma_(a, a, squares[j]);
        }
    float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    for (; i < size; i++) total += x[i] * x[i];
    return 1.0f / sqrtf(total / (float)size + eps);
}

INLINE void scale_by(const float *x, float factor, const float *weight, float *out, int64_t size) {
    int64_t i = 0;
    for (; i + VL <= size; i += VL) store(out + i, mul(mul(load(x + i), splat(factor)), load(weight + i)));
    for (; i < size; i++) out[i] = x[i] * factor * weight[i];
}

INLINE void add_to(float *x, const float *delta, int64_t size) {
    int64_t i = 0;
    for (; i + VL <= size; i += VL) store(x + i, add(load(x + i), load(delta + i)));
    for (; i < size; i++) x[i] += delta[i];
}

/* residual += delta (where given); out = norm(residual) * weight. All [rows][size], contiguous. `_in_team`: the calling
 * team's work, here and below; every thread of it calls with the same arguments. */
static void add_rms_norm_in_team(float *residual, const float *delta, const float *weight, float *out, int64_t rows,
                                 int64_t size, float eps) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *x = residual + row * size;
        if (delta != 0) add_to(x, delta + row * size, size);
        scale_by(x, inverse_rms(x, size, eps), weight, out + row * size, size);
    }
}

EXPORT void NAME(add_rms_norm)(float *residual, const float *delta, const float *weight, float *out, int64_t rows,
                               int64_t size, float eps, int threads) {
#pragma omp parallel num_threads(threads) if (rows > 1 && rows * size > SERIAL)
    add_rms_norm_in_team(residual, delta, weight, out, rows, size, eps);
}

/* out = silu(gate) * up, or tanh-approximated gelu(gate) * up. gate_up: [rows][2 * size], out: [rows][size]. */
static void gated_activation_in_team(const float *gate_up, float *out, int64_t rows, int64_t size, int gelu) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        float *y = out + row * size;
        for (int64_t i = 0; i < size; i += VL) {
            float padded[2][VL];
            const int64_t n = size - i < VL ? size - i : VL;
            if (n < VL) { /* the last, partial vector */
                memset(padded, 0, sizeof padded);
                memcpy(padded[0], gate + i, n * sizeof(float));
                memcpy(padded[1], up + i, n * sizeof(float));
            }
            const vf g = n < VL ? load(padded[0]) : load(gate + i), u = n < VL ? load(padded[1]) : load(up + i);
            vf z = g; /* x * sigmoid(z) */
            if (gelu) z = mul(mul(g, splat(1.5957691216057308f)), fma_(mul(g, g), splat(0.044715f), splat(1.0f)));
            const vf e = exp_(sub(splat(0.0f), z));
            const vf result = mul(div_(g, add(splat(1.0f), e)), u);
            if (n < VL) {
                store(padded[0], result);
                memcpy(y + i, padded[0], n * sizeof(float));
            } else {
                store(y + i, result);
            }
        }
    }
}

EXPORT void NAME(gated_activation)(const float *gate_up, float *out, int64_t rows, int64_t size, int gelu,
                                   int threads) {
#pragma omp parallel num_threads(threads) if (rows > 1 && rows * size > SERIAL)
    gated_activation_in_team(gate_up, out, rows, size, gelu);
}

typedef struct {
    float *qkv;               /* [tokens][(heads + 2 * kv_heads) * dim]; queries are rotated in place */
    const float *table;       /* [positions][rotary_dim]: cosines, then sines; unused where rotary_dim is 0 */
    const int64_t *positions; /* [tokens] */
    const int64_t *slots;     /* [tokens] */
    const float *q_norm, *k_norm; /* [dim], or null */
    void *k, *v;              /* [slots][kv_heads][dim] */
    float *k_scale, *v_scale; /* [slots][kv_heads] where k and v are int8 */
    int64_t tokens;
    int32_t heads, kv_heads, dim, rotary_dim, kv_type, threads;
    float eps;
} RotateCall;

/* (a, b) -> (a cos - b sin, b cos + a sin), the second half of the rotated dims being b. */
INLINE void rotate(float *x, const float *cos_sin, int64_t half) {
    const float *sin_ = cos_sin + half;
    int64_t i = 0;
    for (; i + VL <= half; i += VL) {
        const vf a = load(x + i), b = load(x + half + i), c = load(cos_sin + i), s = load(sin_ + i);
        store(x + i, sub(mul(a, c), mul(b, s)));
        store(x + half + i, add(mul(b, c), mul(a, s)));
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos_sin[i] - b * sin_[i];
        x[half + i] = b * cos_sin[i] + a * sin_[i];
    }
}

INLINE void put(int type, const float *x, void *pages, float *scales, int64_t head, int64_t dim) {
    const int64_t at = head * dim;
    if (type == F32) {
        memcpy((float *)pages + at, x, dim * sizeof(float));
    } else if (type == F16) {
        for (int64_t i = 0; i < dim; i++) ((uint16_t *)pages)[at + i] = float_to_half(x[i]);
    } else if (type == BF16) {
        for (int64_t i = 0; i < dim; i++) ((uint16_t *)pages)[at + i] = float_to_bf16(x[i]);
    } else {
        float high = 1e-12f * 127;
        for (int64_t i = 0; i < dim; i++) high = fmaxf(high, fabsf(x[i]));
        const float scale = high / 127;
        scales[head] = scale;
        for (int64_t i = 0; i < dim; i++) ((int8_t *)pages)[at + i] = (int8_t)rintf(x[i] / scale);
    }
}

/* Norm each query and key head where asked, rotate both, and write keys and values to their page slots. */
static void rotate_and_store_in_team(const RotateCall *c) {
    const int64_t dim = c->dim, heads = c->heads, kv_heads = c->kv_heads, width = (heads + 2 * kv_heads) * dim;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < c->tokens; t++) {
        float *row = c->qkv + t * width;
        const float *cos_sin = c->table + c->positions[t] * c->rotary_dim;
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            const float *norm = h < heads ? c->q_norm : c->k_norm;
            float *x = row + h * dim;
            if (norm != 0) scale_by(x, inverse_rms(x, dim, c->eps), norm, x, dim);
            if (c->rotary_dim > 0) rotate(x, cos_sin, c->rotary_dim / 2);
        }
        for (int64_t h = 0; h < kv_heads; h++) {
            const float *k = row + (heads + h) * dim, *v = row + (heads + kv_heads + h) * dim;
            const int64_t to = c->slots[t] * kv_heads + h;
            put(c->kv_type, k, c->k, c->k_scale, to, dim);
            put(c->kv_type, v, c->v, c->v_scale, to, dim);
        }
    }
}

EXPORT void NAME(rotate_and_store)(const RotateCall *c) {
    const int64_t width = (int64_t)(c->heads + 2 * c->kv_heads) * c->dim;
#pragma omp parallel num_threads(c->threads) if (c->tokens > 1 && c->tokens * width > SERIAL)
    rotate_and_store_in_team(c);
}
