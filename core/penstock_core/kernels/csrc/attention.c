/* Attention of short queries over pages: decodes and draft checks.
 *
 * One task is one (sequence, KV head, few query tokens): the query heads that share the KV head read its keys and values
 * once. Keys are taken page by page with the running maximum and sum of FlashAttention (Dao et al., 2022); the order of
 * every sum depends on a token's own position alone, so neither the batch nor the chunking can change a bit.
 */
#include "simd.h"

#define ROWS 8 /* query rows (tokens x heads of the group) that share one read of a page */
#define MAX_DIM 512
#define MAX_PAGE 64
#define SERIAL_ATTENTION 500000 /* multiplications below which a second thread saves less than it may keep us waiting */
#define FOR_ROWS _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)

typedef struct {
    const float *q;                 /* [tokens][q_stride], of which heads * dim are read */
    float *out;                     /* [tokens][heads][dim] */
    const void *k, *v;              /* [pages][page_size][kv_heads][dim] */
    const float *k_scale, *v_scale; /* [pages][page_size][kv_heads] where k and v are int8 */
    const int32_t *block_table;     /* [sequences][table_stride] */
    const int32_t *query_start;     /* [sequences + 1] */
    const int32_t *seq_lens;        /* [sequences] */
    const int32_t *selected;        /* [num_selected]: the sequences to compute; null for all */
    int64_t q_stride, table_stride;
    int32_t num_selected, heads, kv_heads, dim, page_size, window, kv_type, max_query_len, threads;
    float scale, softcap; /* window and softcap: 0 for none */
} AttentionCall;

typedef struct { /* the query rows of one task, and what they have gathered so far */
    const float *q[ROWS];
    float *out[ROWS];
    int64_t position[ROWS]; /* ascending */
    float top[ROWS], total[ROWS];
    float acc[ROWS][MAX_DIM] __attribute__((aligned(64)));
    float p[ROWS][MAX_PAGE] __attribute__((aligned(64)));
} Rows;

/* p[r][t] = scale * q[r] . key[t], for count keys `step` floats apart. `rows` is a constant where this is inlined. */
INLINE void score(Rows *s, int rows, const float *key, int64_t step, int64_t count, int64_t dim, float scale) {
    const int64_t whole = dim / VL * VL;
    for (int64_t t = 0; t < count; t++, key += step) {
        vf dot[ROWS];
        FOR_ROWS dot[r] = splat(0.0f);
        for (int64_t d = 0; d < whole; d += VL) {
            const vf k = load(key + d);
            FOR_ROWS dot[r] = fma_(k, load(s->q[r] + d), dot[r]);
        }
        FOR_ROWS {
            float x = sum(dot[r]);
            for (int64_t d = whole; d < dim; d++) x += key[d] * s->q[r][d];
            s->p[r][t] = x * scale;
        }
    }
}

/* acc[r] += sum over t of p[r][t] * value[t]. */
INLINE void gather(Rows *s, int rows, const float *value, int64_t step, int64_t count, int64_t dim) {
    int64_t d = 0;
    for (; d + 2 * VL <= dim; d += 2 * VL) {
        vf low[ROWS], high[ROWS];
        FOR_ROWS low[r] = load(s->acc[r] + d), high[r] = load(s->acc[r] + d + VL);
        const float *at = value + d;
        for (int64_t t = 0; t < count; t++, at += step) {
            const vf a = load(at), b = load(at + VL);
            FOR_ROWS {
                const vf weight = splat(s->p[r][t]);
                low[r] = fma_(weight, a, low[r]);
                high[r] = fma_(weight, b, high[r]);
            }
        }
        FOR_ROWS store(s->acc[r] + d, low[r]), store(s->acc[r] + d + VL, high[r]);
    }
    for (; d < dim; d++)
        for (int r = 0; r < rows; r++)
            for (int64_t t = 0; t < count; t++) s->acc[r][d] += s->p[r][t] * value[t * step + d];
}

#define DISPATCH(call)                                                                                   \
    switch (rows) {                                                                                      \
    case 1: { enum { rows = 1 }; call; } break;                                                          \
    case 2: { enum { rows = 2 }; call; } break;                                                          \
    case 3: { enum { rows = 3 }; call; } break;                                                          \
    case 4: { enum { rows = 4 }; call; } break;                                                          \
    case 5: { enum { rows = 5 }; call; } break;                                                          \
    case 6: { enum { rows = 6 }; call; } break;                                                          \
    case 7: { enum { rows = 7 }; call; } break;                                                          \
    default: { enum { rows = 8 }; call; }                                                                \
    }
static void score_rows(Rows *s, int rows, const float *key, int64_t step, int64_t count, int64_t dim, float scale) {
    DISPATCH(score(s, rows, key, step, count, dim, scale))
}
static void gather_rows(Rows *s, int rows, const float *value, int64_t step, int64_t count, int64_t dim) {
    DISPATCH(gather(s, rows, value, step, count, dim))
}
#undef DISPATCH

/* Scores of one page become weights against the running maximum; what was gathered is scaled to it. */
static void weigh(Rows *s, int r, int64_t count, int64_t begin, int64_t dim, int window, float softcap) {
    const int64_t padded = (count + VL - 1) / VL * VL;
    const int64_t last = s->position[r] - begin, seen_from = window > 0 ? last - window + 1 : 0;
    const int64_t unseen = last < 0 ? 0 : last < count ? last + 1 : count; /* from here on, later tokens or padding */
    float *p = s->p[r];
    if (softcap > 0)
        for (int64_t t = 0; t < count; t++) p[t] = tanhf(p[t] / softcap) * softcap;
    for (int64_t t = unseen; t < padded; t++) p[t] = -INFINITY;
    for (int64_t t = 0; t < seen_from && t < padded; t++) p[t] = -INFINITY;
    vf high = splat(-INFINITY);
    for (int64_t t = 0; t < padded; t += VL) high = max_(high, load(p + t));
    const float now = fmaxf(s->top[r], largest(high));
    if (now == -INFINITY) { /* nothing of this page is seen, and nothing was before */
        memset(p, 0, sizeof(float) * padded);
        return;
    }
    const float keep = s->top[r] == -INFINITY ? 0.0f : expf(s->top[r] - now);
    vf added = splat(0.0f);
    for (int64_t t = 0; t < padded; t += VL) {
        const vf e = exp_(sub(load(p + t), splat(now)));
        added = add(added, e);
        store(p + t, e);
    }
    s->total[r] = s->total[r] * keep + sum(added);
    s->top[r] = now;
    if (keep != 1.0f)
        for (int64_t d = 0; d < dim; d++) s->acc[r][d] *= keep;
}

/* The rows of one page and head as floats: in place where they are, else converted into `scratch`. */
INLINE const float *as_floats(const AttentionCall *c, const void *base, const float *scales, int64_t slot,
                              int64_t kv_head, int64_t count, float *scratch) {
    const int64_t dim = c->dim, whole = dim / VL * VL;
    const int type = c->kv_type;
    for (int64_t t = 0; t < count; t++) {
        const int64_t head = (slot + t) * c->kv_heads + kv_head, at = head * dim;
        const float scale = type == I8 ? scales[head] : 1.0f;
        float *row = scratch + t * dim;
        if (type == F16)
            for (int64_t d = 0; d < whole; d += VL) store(row + d, load_f16((const uint16_t *)base + at + d));
        else if (type == BF16)
            for (int64_t d = 0; d < whole; d += VL) store(row + d, load_bf16((const uint16_t *)base + at + d));
        else
            for (int64_t d = 0; d < whole; d += VL)
                store(row + d, mul(load_i8((const int8_t *)base + at + d), splat(scale)));
        for (int64_t d = whole; d < dim; d++) row[d] = value_as(type, base, at + d) * scale;
    }
    return scratch;
}

static void attend_rows(const AttentionCall *c, Rows *s, int rows, const int32_t *table, int64_t kv_head) {
    float scratch[MAX_PAGE * MAX_DIM] __attribute__((aligned(64)));
    const int64_t dim = c->dim, page_size = c->page_size;
    const int64_t step = c->kv_type == F32 ? (int64_t)c->kv_heads * dim : dim;
    int64_t first = 0, last = s->position[rows - 1]; /* keys that any row sees */
    if (c->window > 0 && s->position[0] - c->window + 1 > 0) first = s->position[0] - c->window + 1;
    for (int r = 0; r < rows; r++) {
        memset(s->acc[r], 0, sizeof(float) * dim);
        s->top[r] = -INFINITY;
        s->total[r] = 0.0f;
    }
    for (int64_t page = first / page_size; page <= last / page_size; page++) {
        const int64_t begin = page * page_size, slot = (int64_t)table[page] * page_size;
        const int64_t count = last - begin + 1 < page_size ? last - begin + 1 : page_size;
        const int64_t at = (slot * c->kv_heads + kv_head) * dim;
        const float *rows_of = c->kv_type == F32 ? (const float *)c->k + at
                                                 : as_floats(c, c->k, c->k_scale, slot, kv_head, count, scratch);
        score_rows(s, rows, rows_of, step, count, dim, c->scale);
        for (int r = 0; r < rows; r++) weigh(s, r, count, begin, dim, c->window, c->softcap);
        rows_of = c->kv_type == F32 ? (const float *)c->v + at
                                    : as_floats(c, c->v, c->v_scale, slot, kv_head, count, scratch);
        gather_rows(s, rows, rows_of, step, count, dim);
    }
    for (int r = 0; r < rows; r++)
        for (int64_t d = 0; d < dim; d++) s->out[r][d] = s->acc[r][d] / s->total[r];
}

/* Query tokens [from, to) of one sequence against one KV head. */
static void attend_task(const AttentionCall *c, int64_t n, int64_t kv_head, int64_t from, int64_t to) {
    const int64_t group = c->heads / c->kv_heads, start = c->query_start[n];
    const int64_t context = c->seq_lens[n] - (c->query_start[n + 1] - start); /* tokens before this step's */
    const int32_t *table = c->block_table + n * c->table_stride;
    Rows s;
    int rows = 0;
    for (int64_t token = from; token < to; token++)
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
            s.q[rows] = c->q + (start + token) * c->q_stride + head * c->dim;
            s.out[rows] = c->out + ((start + token) * c->heads + head) * c->dim;
            s.position[rows] = context + token;
            if (++rows == ROWS || (token == to - 1 && head == (kv_head + 1) * group - 1)) {
                attend_rows(c, &s, rows, table, kv_head);
                rows = 0;
            }
        }
}

/* The calling team's work: every thread of it calls this with the same arguments. */
static void paged_attention_in_team(const AttentionCall *c) {
    const int64_t group = c->heads / c->kv_heads;
    const int64_t span = group >= ROWS ? 1 : ROWS / group; /* query tokens of one task */
    const int64_t blocks = (c->max_query_len + span - 1) / span;
    const int64_t tasks = (int64_t)c->num_selected * c->kv_heads * blocks;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t place = task / blocks / c->kv_heads, kv_head = task / blocks % c->kv_heads;
        const int64_t n = c->selected != 0 ? c->selected[place] : place;
        const int64_t from = task % blocks * span, length = c->query_start[n + 1] - c->query_start[n];
        if (from < length) attend_task(c, n, kv_head, from, from + span < length ? from + span : length);
    }
}

EXPORT void NAME(paged_attention)(const AttentionCall *c) {
    int64_t work = 0; /* multiplications, of scores and of values */
    for (int64_t i = 0; i < c->num_selected; i++) {
        const int64_t n = c->selected != 0 ? c->selected[i] : i;
        work += (int64_t)(c->query_start[n + 1] - c->query_start[n]) * c->seq_lens[n] * 2 * c->heads * c->dim;
    }
#pragma omp parallel num_threads(c->threads) if (work > SERIAL_ATTENTION)
    paged_attention_in_team(c);
}
