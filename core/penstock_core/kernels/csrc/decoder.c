/* A whole decoder in one call: every layer's products, norms, rotary embedding, page writes and attention.
 *
 * A small model's step is mostly the cost of starting it: one call and one parallel region take the place of some ten
 * operators a layer. The parts are the other files' own, in the same order, so the bits are the same as theirs.
 */
#include "simd.h"

typedef struct { /* a packed weight, as linear.c or (type I8) linear_int8.c takes it */
    const void *w;
    const float *w_scale, *bias;
    int64_t n, k;
    int64_t type;
} Matrix;

typedef struct { /* any norm may be null: none */
    Matrix qkv, output, gate_up, down;
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;
    const float *q_norm, *k_norm; /* [dim] of each head, or with `norm_projections` of all heads together */
    const float *rope;            /* [positions][rotary_dim] */
    void *k, *v;
    float *k_scale, *v_scale;
    int32_t rotary_dim, window, kv_type, norm_projections;
} Layer;

typedef struct {
    const Layer *layers;
    Matrix head;
    const void *embedding; /* [vocab][hidden] */
    const float *norm;     /* the last one */
    int64_t vocab, num_layers, hidden, heads, kv_heads, dim, intermediate, page_size;
    int32_t gelu, embedding_type;
    float embed_scale, eps, scale, softcap;
} Decoder;

typedef struct {
    const Decoder *decoder;
    const int64_t *token_ids, *positions, *slots; /* [tokens] */
    const int32_t *block_table, *query_start, *seq_lens;
    float *out;     /* [tokens][hidden] */
    float *scratch; /* [tokens * scratch_width] */
    int64_t tokens, sequences, table_stride;
    int32_t threads;
} DecodeCall;

/* Floats of scratch that one token needs. */
static int64_t scratch_width(const Decoder *d) {
    const int64_t attended = d->heads * d->dim, widest = most(most(d->hidden, attended), d->intermediate);
    return 3 * d->hidden + attended + (d->heads + 2 * d->kv_heads) * d->dim + 3 * d->intermediate + widest + 8;
}

static void multiply_in_team(const Matrix *a, const float *x, int64_t m, float *out, float *scratch) {
    if (a->type == I8) {
#if defined(__AVX512VNNI__)
        const int64_t fours = (a->k + 3) / 4;
        int32_t *rounded = (int32_t *)scratch, *sums = rounded + m * fours;
        const Int8LinearCall c = {a->w, a->w_scale, a->bias, x, out, (int8_t *)rounded, (float *)(sums + m), sums,
                                  m, a->n, a->k, a->k, 1};
        linear_int8_in_team(&c);
#endif
        return;
    }
    const LinearCall c = {a->w, a->bias, x, out, scratch, m, a->n, a->k, a->k, (int32_t)a->type, 1};
    linear_in_team(&c);
}

/* Rows of the embedding, widened and scaled. */
static void embed_in_team(const Decoder *d, const int64_t *token_ids, int64_t tokens, float *out) {
    const int64_t size = d->hidden, whole = size / VL * VL;
    const int type = d->embedding_type;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t at = token_ids[t] * size;
        float *x = out + t * size;
        if (type == F32)
            memcpy(x, (const float *)d->embedding + at, size * sizeof(float));
        else if (type == F16)
            for (int64_t i = 0; i < whole; i += VL) store(x + i, load_f16((const uint16_t *)d->embedding + at + i));
        else
            for (int64_t i = 0; i < whole; i += VL) store(x + i, load_bf16((const uint16_t *)d->embedding + at + i));
        if (type != F32)
            for (int64_t i = whole; i < size; i++) x[i] = value_as(type, d->embedding, at + i);
        if (d->embed_scale != 1.0f)
            for (int64_t i = 0; i < size; i++) x[i] *= d->embed_scale;
    }
}

/* residual += delta (where given); its norm goes to `out`. Returns where the result is. */
static const float *enter_in_team(const Decoder *d, float *residual, const float *delta, const float *norm, float *out,
                                  int64_t tokens) {
    const int64_t size = d->hidden;
    if (norm != 0) {
        add_rms_norm_in_team(residual, delta, norm, out, tokens, size, d->eps);
        return out;
    }
    if (delta != 0) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) add_to(residual + t * size, delta + t * size, size);
    }
    return residual;
}

static void leave_in_team(const Decoder *d, float *x, const float *norm, int64_t tokens) {
    if (norm != 0) add_rms_norm_in_team(x, 0, norm, x, tokens, d->hidden, d->eps);
}

/* OLMo 2: all queries of a token are normed together, and all keys. */
static void norm_projections_in_team(const Decoder *d, const Layer *layer, float *qkv, int64_t tokens) {
    const int64_t q = d->heads * d->dim, k = d->kv_heads * d->dim;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        float *row = qkv + t * (q + 2 * k);
        scale_by(row, inverse_rms(row, q, d->eps), layer->q_norm, row, q);
        scale_by(row + q, inverse_rms(row + q, k, d->eps), layer->k_norm, row + q, k);
    }
}

static void forward_in_team(const DecodeCall *c) {
    const Decoder *d = c->decoder;
    const int64_t tokens = c->tokens, hidden = d->hidden, attended = d->heads * d->dim;
    const int64_t width = (d->heads + 2 * d->kv_heads) * d->dim;
    float *residual = c->scratch, *normed = residual + tokens * hidden, *delta = normed + tokens * hidden;
    float *qkv = delta + tokens * hidden, *mixed = qkv + tokens * width, *gate_up = mixed + tokens * attended;
    float *activated = gate_up + tokens * 2 * d->intermediate, *rest = activated + tokens * d->intermediate;
    embed_in_team(d, c->token_ids, tokens, residual);
    for (int64_t i = 0; i < d->num_layers; i++) {
        const Layer *layer = &d->layers[i];
        const int whole = layer->norm_projections;
        const float *x = enter_in_team(d, residual, i > 0 ? delta : 0, layer->before_attention, normed, tokens);
        multiply_in_team(&layer->qkv, x, tokens, qkv, rest);
        if (whole) norm_projections_in_team(d, layer, qkv, tokens);
        const RotateCall rotate_call = {
            qkv, layer->rope, c->positions, c->slots, whole ? 0 : layer->q_norm, whole ? 0 : layer->k_norm,
            layer->k, layer->v, layer->k_scale, layer->v_scale, tokens,
            (int32_t)d->heads, (int32_t)d->kv_heads, (int32_t)d->dim, layer->rotary_dim, layer->kv_type, 1, d->eps};
        rotate_and_store_in_team(&rotate_call);
        const AttentionCall attention = {
            qkv, mixed, layer->k, layer->v, layer->k_scale, layer->v_scale, c->block_table, c->query_start,
            c->seq_lens, width, c->table_stride, (int32_t)c->sequences, (int32_t)d->heads, (int32_t)d->kv_heads,
            (int32_t)d->dim, (int32_t)d->page_size, layer->window, layer->kv_type, 1, d->scale, d->softcap};
        paged_attention_in_team(&attention);
        multiply_in_team(&layer->output, mixed, tokens, delta, rest);
        leave_in_team(d, delta, layer->after_attention, tokens);
        x = enter_in_team(d, residual, delta, layer->before_mlp, normed, tokens);
        multiply_in_team(&layer->gate_up, x, tokens, gate_up, rest);
        gated_activation_in_team(gate_up, activated, tokens, d->intermediate, d->gelu);
        multiply_in_team(&layer->down, activated, tokens, delta, rest);
        leave_in_team(d, delta, layer->after_mlp, tokens);
    }
    add_rms_norm_in_team(residual, d->num_layers > 0 ? delta : 0, d->norm, c->out, tokens, hidden, d->eps);
}

EXPORT int64_t NAME(decoder_scratch)(const Decoder *d) { return scratch_width(d); }

static int all_known(const DecodeCall *c) {
    for (int64_t t = 0; t < c->tokens; t++)
        if (c->token_ids[t] < 0 || c->token_ids[t] >= c->decoder->vocab) return 0;
    return 1;
}

/* Run all layers. 0, and nothing done, where a token is outside the vocabulary; else 1. */
EXPORT int NAME(decode)(const DecodeCall *c) {
    if (!all_known(c)) return 0;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    forward_in_team(c);
    return 1;
}
