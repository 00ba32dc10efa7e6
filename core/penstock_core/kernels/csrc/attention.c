/* Attention over pages, of prompts as of decodes: blocks of keys against tiles of query rows kept in registers.
 *
 * One task is some query rows (tokens x heads that share a KV head) of one sequence. It takes keys in blocks whose places
 * are fixed, packs each with its numbers side by side by key, so that a tile's scores are sums of outer products, and
 * keeps the running maximum and sum of FlashAttention (Dao et al., 2022). The order of every sum depends on a token's own
 * position alone, so neither the batch nor the chunking can change a bit.
 */
#include "simd.h"

#define MAX_DIM 512
#define KEYS 64 /* of one block; a block begins at a multiple of it */
#if VL == 16
#define TALL 12 /* rows of a tile, by two vectors: 24 sums in 32 registers */
#elif VL == 8
#define TALL 6 /* 12 in 16 */
#else
#define TALL 2
#endif
#define MOST_ROWS 96       /* of one task; TALL divides it */
#define ROW_FLOATS 12288   /* rows of one task x dim, at most: they stay in the second cache beside a block */
#define SERIAL_ATTENTION 500000 /* multiplications below which a second thread saves less than it may keep us waiting */
#define FOR_ROWS _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++)
#define FOR_VECTORS _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)

typedef struct {
    const float *q;                 /* [tokens][q_stride], of which heads * dim are read */
    float *out;                     /* [tokens][heads][dim] */
    const void *k, *v;              /* [pages][page_size][kv_heads][dim] */
    const float *k_scale, *v_scale; /* [pages][page_size][kv_heads] where k and v are int8 */
    const int32_t *block_table;     /* [sequences][table_stride] */
    const int32_t *query_start;     /* [sequences + 1] */
    const int32_t *seq_lens;        /* [sequences] */
    int64_t q_stride, table_stride;
    int32_t sequences, heads, kv_heads, dim, page_size, window, kv_type, threads;
    float scale, softcap; /* window and softcap: 0 for none */
} AttentionCall;

typedef struct { /* the query rows of one task, and what they have gathered so far */
    int rows;
    int64_t position[MOST_ROWS]; /* ascending */
    float top[MOST_ROWS], total[MOST_ROWS];
    float q[ROW_FLOATS] __attribute__((aligned(64)));   /* scaled, by tiles: [dim][rows of the tile] */
    float acc[ROW_FLOATS] __attribute__((aligned(64))); /* [rows][dim] */
} Rows;

typedef struct { /* one block of keys */
    int64_t begin, count;
    int64_t at[KEYS];                     /* where each key's and value's numbers begin */
    float k_scale[KEYS], v_scale[KEYS];   /* of int8 */
    float packed[MAX_DIM * KEYS] __attribute__((aligned(64))); /* keys: [dim][KEYS] */
} Block;

typedef float Weights[TALL][KEYS]; /* of a tile: scores, and then what they weigh */

INLINE int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

/* Where the block's keys are; past the last up to two whole vectors, its copies. */
static void find_block(const AttentionCall *c, Block *b, const int32_t *table, int64_t kv_head) {
    const int64_t size = c->page_size, dim = c->dim, step = c->kv_heads * dim;
    const int64_t padded = up_to(b->count, 2 * VL);
    int64_t page = b->begin / size, offset = b->begin % size;
    for (int64_t t = 0; t < b->count; page++, offset = 0)
        for (int64_t at = ((table[page] * size + offset) * c->kv_heads + kv_head) * dim;
             offset < size && t < b->count; offset++, t++, at += step)
            b->at[t] = at;
    for (int64_t t = b->count; t < padded; t++) b->at[t] = b->at[b->count - 1];
    if (c->kv_type == I8)
        for (int64_t t = 0; t < padded; t++) {
            b->k_scale[t] = c->k_scale[b->at[t] / dim];
            b->v_scale[t] = c->v_scale[b->at[t] / dim];
        }
}

/* Ask for rows that are read soon, as far as the second cache: rows of one head lie too far apart for the processor to
 * see where it goes, and the first cache would not hold them. */
INLINE void ask_for(int type, const void *base, const int64_t *at, int64_t count, int64_t dim) {
    const int64_t size = type == F32 ? 4 : type == I8 ? 1 : 2;
    for (int64_t i = 0; i < count; i++)
        for (int64_t line = 0; line < dim * size; line += 64)
            __builtin_prefetch((const char *)base + at[i] * size + line, 0, 2);
}

/* packed[d][t] = key[t][d]. */
INLINE void pack_as(int type, const void *keys, const void *values, Block *b, int64_t dim) {
    const int64_t whole = dim / VL * VL;
    ask_for(type, keys, b->at, b->count, dim);
    for (int64_t t = 0; t < up_to(b->count, 2 * VL); t += VL) {
        ask_for(type, values, b->at + t, VL, dim);
        for (int64_t d = 0; d < whole; d += VL) {
            vf square[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) square[i] = load_as(type, keys, b->at[t + i] + d);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) store(b->packed + (d + i) * KEYS + t, square[i]);
        }
        for (int64_t d = whole; d < dim; d++)
            for (int i = 0; i < VL; i++) b->packed[d * KEYS + t + i] = value_as(type, keys, b->at[t + i] + d);
    }
}

/* p[r][t] = q[r] . key[t], in the order of dim. `rows` and `vectors` are constants where this is inlined. */
INLINE void score_tile(int rows, int vectors, const float *q, const Block *b, int64_t count, int64_t dim, Weights p) {
    for (int64_t t = 0; t < count; t += vectors * VL) {
        vf dot[TALL][4];
        FOR_ROWS FOR_VECTORS dot[r][v] = splat(0.0f);
        for (int64_t d = 0; d < dim; d++) {
            vf key[4];
            FOR_VECTORS key[v] = load(b->packed + d * KEYS + t + v * VL);
            FOR_ROWS {
                const vf x = splat(q[d * rows + r]);
                FOR_VECTORS dot[r][v] = fma_(x, key[v], dot[r][v]);
            }
        }
        FOR_ROWS FOR_VECTORS store(p[r] + t + v * VL, dot[r][v]);
    }
}

/* acc[r] += sum over t of p[r][t] * value[t], in the order of t. */
INLINE void gather_tile(int rows, int type, const void *values, const Block *b, int64_t count, int64_t dim, Weights p,
                        float *acc) {
    int64_t d = 0;
    for (; d + 2 * VL <= dim; d += 2 * VL) {
        vf low[TALL], high[TALL];
        FOR_ROWS low[r] = load(acc + r * dim + d), high[r] = load(acc + r * dim + d + VL);
        for (int64_t t = 0; t < count; t++) {
            const vf x = load_as(type, values, b->at[t] + d), y = load_as(type, values, b->at[t] + d + VL);
            FOR_ROWS {
                const vf weight = splat(p[r][t]);
                low[r] = fma_(weight, x, low[r]);
                high[r] = fma_(weight, y, high[r]);
            }
        }
        FOR_ROWS store(acc + r * dim + d, low[r]), store(acc + r * dim + d + VL, high[r]);
    }
    for (; d < dim; d++)
        for (int r = 0; r < rows; r++)
            for (int64_t t = 0; t < count; t++) acc[r * dim + d] += p[r][t] * value_as(type, values, b->at[t] + d);
}

#define SHORT_TILE(n)                                                                                              \
    case n: score_tile(n, 4, q, b, count, dim, p); break;                                                          \
    case TALL + n: score_tile(n, 2, q, b, count, dim, p); break;
#define TALL_TILE(n) \
    case n: score_tile(n, 2, q, b, count, dim, p); break;
#define GATHER(n) \
    case n: gather_tile(n, type, values, b, count, dim, p, acc); break;
#if TALL == 12
#define ALL_SCORES                                                                                                 \
    SHORT_TILE(1) SHORT_TILE(2) SHORT_TILE(3) SHORT_TILE(4) SHORT_TILE(5) SHORT_TILE(6)                            \
    TALL_TILE(7) TALL_TILE(8) TALL_TILE(9) TALL_TILE(10) TALL_TILE(11) TALL_TILE(12)
#define ALL_GATHERS                                                                                                \
    GATHER(1) GATHER(2) GATHER(3) GATHER(4) GATHER(5) GATHER(6) GATHER(7) GATHER(8) GATHER(9) GATHER(10) GATHER(11) \
    GATHER(12)
#elif TALL == 6
#define ALL_SCORES SHORT_TILE(1) SHORT_TILE(2) SHORT_TILE(3) TALL_TILE(4) TALL_TILE(5) TALL_TILE(6)
#define ALL_GATHERS GATHER(1) GATHER(2) GATHER(3) GATHER(4) GATHER(5) GATHER(6)
#else
#define ALL_SCORES SHORT_TILE(1) TALL_TILE(2)
#define ALL_GATHERS GATHER(1) GATHER(2)
#endif
static void score_rows(int rows, const float *q, const Block *b, int64_t count, int64_t dim, Weights p) {
    const int short_block = rows <= TALL / 2 && up_to(count, 2 * VL) % (4 * VL) != 0;
    switch (short_block ? TALL + rows : rows) { ALL_SCORES }
}
#define TYPED(t)                                                                                                   \
    static void PASTE(pack, t)(const void *keys, const void *values, Block *b, int64_t dim) {                      \
        pack_as(t, keys, values, b, dim);                                                                          \
    }                                                                                                              \
    static void PASTE(gather, t)(int rows, const void *values, const Block *b, int64_t count, int64_t dim,         \
                                 Weights p, float *acc) {                                                          \
        enum { type = t };                                                                                         \
        switch (rows) { ALL_GATHERS }                                                                              \
    }
TYPED(F32) TYPED(F16) TYPED(BF16) TYPED(I8)

static void pack_block(const AttentionCall *c, Block *b) {
    switch (c->kv_type) {
    case F16: pack_F16(c->k, c->v, b, c->dim); break;
    case BF16: pack_BF16(c->k, c->v, b, c->dim); break;
    case I8: pack_I8(c->k, c->v, b, c->dim); break;
    default: pack_F32(c->k, c->v, b, c->dim);
    }
}

static void gather_rows(const AttentionCall *c, int rows, const Block *b, int64_t count, Weights p, float *acc) {
    switch (c->kv_type) {
    case F16: gather_F16(rows, c->v, b, count, c->dim, p, acc); break;
    case BF16: gather_BF16(rows, c->v, b, count, c->dim, p, acc); break;
    case I8: gather_I8(rows, c->v, b, count, c->dim, p, acc); break;
    default: gather_F32(rows, c->v, b, count, c->dim, p, acc);
    }
}

/* Scores of one block become weights against the running maximum; what was gathered is scaled to it. */
static void weigh(const AttentionCall *c, Rows *s, int first, int rows, const Block *b, int64_t count, Weights p) {
    const int64_t padded = up_to(count, VL), dim = c->dim;
    float shift[16] __attribute__((aligned(64))) = {0}, keep[16] __attribute__((aligned(64))) = {0};
    for (int r = 0; r < rows; r++) {
        const int64_t last = s->position[first + r] - b->begin, seen_from = c->window > 0 ? last - c->window + 1 : 0;
        if (c->kv_type == I8)
            for (int64_t t = 0; t < padded; t += VL) store(p[r] + t, mul(load(p[r] + t), load(b->k_scale + t)));
        if (c->softcap > 0)
            for (int64_t t = 0; t < padded; t += VL) /* tanh(x) = 1 - 2 / (e^2x + 1) */
                store(p[r] + t,
                      mul(splat(c->softcap),
                          sub(splat(1.0f), div_(splat(2.0f), add(exp_(mul(load(p[r] + t), splat(2 / c->softcap))),
                                                                 splat(1.0f))))));
        for (int64_t t = last < 0 ? 0 : last + 1; t < padded; t++) p[r][t] = -INFINITY; /* later tokens, or padding */
        for (int64_t t = 0; t < seen_from && t < padded; t++) p[r][t] = -INFINITY;
        vf high = splat(s->top[first + r]);
        for (int64_t t = 0; t < padded; t += VL) high = max_(high, load(p[r] + t));
        const float now = largest(high);
        shift[r] = now == -INFINITY ? 0.0f : now; /* nothing seen so far: all weights become 0 */
        keep[r] = s->top[first + r] - shift[r];
        s->top[first + r] = now;
    }
    for (int r = 0; r < 16; r += VL) store(keep + r, exp_(load(keep + r)));
    for (int r = 0; r < rows; r++) {
        vf added = splat(0.0f);
        for (int64_t t = 0; t < padded; t += VL) {
            const vf e = exp_(sub(load(p[r] + t), splat(shift[r])));
            added = add(added, e);
            store(p[r] + t, c->kv_type == I8 ? mul(e, load(b->v_scale + t)) : e);
        }
        s->total[first + r] = s->total[first + r] * keep[r] + sum(added);
        float *acc = s->acc + (first + r) * dim;
        if (keep[r] == 1.0f) continue;
        int64_t d = 0;
        for (; d + VL <= dim; d += VL) store(acc + d, mul(load(acc + d), splat(keep[r])));
        for (; d < dim; d++) acc[d] *= keep[r];
    }
}

/* Rows are shared out evenly: tile i of `tiles` has rows [first_of(i), first_of(i + 1)). */
INLINE int first_of(int i, int tiles, int rows) { return i * rows / tiles; }

static void attend_rows(const AttentionCall *c, Rows *s, const int32_t *table, int64_t kv_head) {
    Block b;
    Weights p __attribute__((aligned(64)));
    const int64_t dim = c->dim, last = s->position[s->rows - 1];
    const int tiles = (s->rows + TALL - 1) / TALL;
    int64_t first = 0; /* keys from here on are seen by any row */
    if (c->window > 0 && s->position[0] - c->window + 1 > 0) first = s->position[0] - c->window + 1;
    memset(s->acc, 0, sizeof(float) * s->rows * dim);
    for (int r = 0; r < s->rows; r++) s->top[r] = -INFINITY, s->total[r] = 0.0f;
    for (b.begin = first / KEYS * KEYS; b.begin <= last; b.begin += KEYS) {
        b.count = least(last - b.begin + 1, KEYS);
        find_block(c, &b, table, kv_head);
        pack_block(c, &b);
        for (int i = 0; i < tiles; i++) {
            const int from = first_of(i, tiles, s->rows), rows = first_of(i + 1, tiles, s->rows) - from;
            const int64_t count = least(s->position[from + rows - 1] - b.begin + 1, b.count);
            if (count <= 0 || (c->window > 0 && s->position[from] - c->window >= b.begin + KEYS - 1)) continue;
            score_rows(rows, s->q + from * dim, &b, count, dim, p);
            weigh(c, s, from, rows, &b, count, p);
            gather_rows(c, rows, &b, count, p, s->acc + from * dim);
        }
    }
}

/* Query rows [from, to) of one sequence and KV head: row r is token r / group, head r % group of those that share it. */
static void attend_task(const AttentionCall *c, int64_t n, int64_t kv_head, int64_t from, int64_t to) {
    const int64_t group = c->heads / c->kv_heads, start = c->query_start[n], dim = c->dim;
    const int64_t context = c->seq_lens[n] - (c->query_start[n + 1] - start); /* tokens before this step's */
    Rows s;
    s.rows = (int)(to - from);
    const int tiles = (s.rows + TALL - 1) / TALL;
    for (int i = 0; i < tiles; i++) {
        const int first = first_of(i, tiles, s.rows), rows = first_of(i + 1, tiles, s.rows) - first;
        const float *q[TALL];
        for (int r = 0; r < rows; r++) {
            const int64_t token = (from + first + r) / group, head = kv_head * group + (from + first + r) % group;
            q[r] = c->q + (start + token) * c->q_stride + head * dim;
            s.position[first + r] = context + token;
        }
        interleave(q, rows, dim, c->scale, s.q + first * dim);
    }
    attend_rows(c, &s, c->block_table + n * c->table_stride, kv_head);
    for (int r = 0; r < s.rows; r++) {
        const int64_t token = (from + r) / group, head = kv_head * group + (from + r) % group;
        float *out = c->out + ((start + token) * c->heads + head) * dim;
        int64_t d = 0;
        for (; d + VL <= dim; d += VL) store(out + d, div_(load(s.acc + r * dim + d), splat(s.total[r])));
        for (; d < dim; d++) out[d] = s.acc[r * dim + d] / s.total[r];
    }
}

/* The calling team's work: every thread of it calls this with the same arguments. */
static void paged_attention_in_team(const AttentionCall *c) {
    const int64_t group = c->heads / c->kv_heads;
    const int64_t limit = least(ROW_FLOATS / c->dim / TALL * TALL, MOST_ROWS);
    int64_t tasks = 0, n = -1, before = 0, after = 0; /* tasks of sequence n are [before, after) */
    for (int64_t i = 0; i < c->sequences; i++)
        tasks += ((c->query_start[i + 1] - c->query_start[i]) * group + limit - 1) / limit * c->kv_heads;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        if (task < before) n = -1, after = 0; /* the runtime went back */
        while (task >= after) {
            n++;
            before = after;
            after += ((c->query_start[n + 1] - c->query_start[n]) * group + limit - 1) / limit * c->kv_heads;
        }
        const int64_t rows = (c->query_start[n + 1] - c->query_start[n]) * group, blocks = (rows + limit - 1) / limit;
        const int64_t block = blocks - 1 - (task - before) / c->kv_heads; /* the last rows see the most keys */
        attend_task(c, n, (task - before) % c->kv_heads, block * rows / blocks, (block + 1) * rows / blocks);
    }
}

EXPORT void NAME(paged_attention)(const AttentionCall *c) {
    int64_t work = 0; /* multiplications, of scores and of values */
    for (int64_t n = 0; n < c->sequences; n++)
        work += (int64_t)(c->query_start[n + 1] - c->query_start[n]) * c->seq_lens[n] * 2 * c->heads * c->dim;
#pragma omp parallel num_threads(c->threads) if (work > SERIAL_ATTENTION)
    paged_attention_in_team(c);
}
