/* The inner loops of attention: one block of keys and values against one tile of query rows kept in registers.
 *
 * A block is packed with its numbers side by side by key, so that a tile's scores are sums of outer products. Every sum
 * has the order of its terms fixed by the key's or the number's place: tiles of any height give a row the same bits.
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

typedef struct { /* one block of keys */
    int64_t begin, count;
    int64_t at[KEYS]; /* where each key's and value's numbers begin; past `count`, copies of the last */
    float k_scale[KEYS], v_scale[KEYS]; /* of int8 */
} Block;

typedef float Weights[TALL][KEYS]; /* of a tile: scores, and then what they weigh */

INLINE int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

/* Where the keys from `begin` on are, up to a block of them. */
static void find_block(const AttentionCall *c, Block *b, const int32_t *table, int64_t begin, int64_t end,
                       int64_t kv_head) {
    const int64_t size = c->page_size, dim = c->dim, step = c->kv_heads * dim;
    int64_t page = begin / size, offset = begin % size;
    b->begin = begin, b->count = least(end - begin, KEYS);
    for (int64_t t = 0; t < b->count; page++, offset = 0)
        for (int64_t at = ((table[page] * size + offset) * c->kv_heads + kv_head) * dim;
             offset < size && t < b->count; offset++, t++, at += step)
            b->at[t] = at;
    for (int64_t t = b->count; t < KEYS; t++) b->at[t] = b->at[b->count - 1];
    if (c->kv_type == I8)
        for (int64_t t = 0; t < up_to(b->count, 2 * VL); t++) {
            b->k_scale[t] = c->k_scale[b->at[t] / dim];
            b->v_scale[t] = c->v_scale[b->at[t] / dim];
        }
}

INLINE int64_t stored_size(int type) { return type == F32 ? 4 : type == I8 ? 1 : 2; }

/* Ask for numbers that are read soon, as far as the second cache: rows of one head lie too far apart for the processor
 * to see where it goes, and the first cache would not hold them. */
INLINE void ask_for(int type, const void *base, int64_t at) {
    __builtin_prefetch((const char *)base + at * stored_size(type), 0, 2);
}

/* The same for the whole rows [from, to) of a block. */
INLINE void ask_for_rows(int type, const void *base, const Block *b, int64_t from, int64_t to, int64_t dim) {
    for (int64_t t = from; t < to; t++)
        for (int64_t d = 0; d < dim; d += 64 / stored_size(type)) ask_for(type, base, b->at[t] + d);
}

/* And for a whole block of keys and of values. */
static void ask_for_block(const AttentionCall *c, const Block *b) {
    ask_for_rows(c->kv_type, c->k, b, 0, b->count, c->dim);
    ask_for_rows(c->kv_type, c->v, b, 0, b->count, c->dim);
}

/* packed[d][t] = key[t][d]; with each of its lines, asks for one of the block that comes after. */
INLINE void pack_as(int type, const void *keys, const Block *b, const Block *after, int64_t dim, float *packed) {
    const int64_t whole = dim / VL * VL, padded = up_to(b->count, 2 * VL);
    for (int64_t t = 0; t < padded; t += VL) {
        for (int64_t d = 0; d < whole; d += VL) {
            vf square[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) {
                square[i] = load_as(type, keys, b->at[t + i] + d);
                ask_for(type, keys, after->at[t + i] + d);
            }
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) store(packed + (d + i) * KEYS + t, square[i]);
        }
        for (int64_t d = whole; d < dim; d++)
            for (int i = 0; i < VL; i++) packed[d * KEYS + t + i] = value_as(type, keys, b->at[t + i] + d);
    }
    ask_for_rows(type, keys, after, padded, after->count, dim);
}

/* p[r][t] = q[r] . key[t], in the order of dim. `rows` and `vectors` are constants where this is inlined. */
INLINE void score_tile(int rows, int vectors, const float *q, const float *packed, int64_t count, int64_t dim,
                       Weights p) {
    for (int64_t t = 0; t < count; t += vectors * VL) {
        vf dot[TALL][4];
        FOR_ROWS FOR_VECTORS dot[r][v] = splat(0.0f);
        for (int64_t d = 0; d < dim; d++) {
            vf key[4];
            FOR_VECTORS key[v] = load(packed + d * KEYS + t + v * VL);
            FOR_ROWS {
                const vf x = splat(q[d * rows + r]);
                FOR_VECTORS dot[r][v] = fma_(x, key[v], dot[r][v]);
            }
        }
        FOR_ROWS FOR_VECTORS store(p[r] + t + v * VL, dot[r][v]);
    }
}

/* acc[r] += sum over t of p[r][t] * value[t], in the order of t. With each line it asks for one of the block that comes
 * after, if that is given. */
INLINE void gather_tile(int rows, int type, const void *values, const Block *b, const Block *after, int64_t count,
                        int64_t dim, Weights p, float *acc) {
    int64_t d = 0;
    for (; d + 2 * VL <= dim; d += 2 * VL) {
        vf low[TALL], high[TALL];
        FOR_ROWS low[r] = load(acc + r * dim + d), high[r] = load(acc + r * dim + d + VL);
        for (int64_t t = 0; t < count; t++) {
            const vf x = load_as(type, values, b->at[t] + d), y = load_as(type, values, b->at[t] + d + VL);
            if (after != 0) {
                ask_for(type, values, after->at[t] + d);
                if (type == F32) ask_for(type, values, after->at[t] + d + VL);
            }
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
    if (after != 0) ask_for_rows(type, values, after, count, after->count, dim);
}

#define SHORT_TILE(n)                                                                                              \
    case n: score_tile(n, 4, q, packed, count, dim, p); break;                                                     \
    case TALL + n: score_tile(n, 2, q, packed, count, dim, p); break;
#define TALL_TILE(n)                                                                                               \
    case n: score_tile(n, 2, q, packed, count, dim, p); break;
#define GATHER(n)                                                                                                  \
    case n: gather_tile(n, type, values, b, after, count, dim, p, acc); break;
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
static void score_rows(int rows, const float *q, const float *packed, int64_t count, int64_t dim, Weights p) {
    const int short_block = rows <= TALL / 2 && up_to(count, 2 * VL) % (4 * VL) != 0;
    switch (short_block ? TALL + rows : rows) { ALL_SCORES }
}
#define TYPED(t)                                                                                                   \
    static void PASTE(pack, t)(const void *keys, const Block *b, const Block *after, int64_t dim, float *packed) { \
        pack_as(t, keys, b, after, dim, packed);                                                                   \
    }                                                                                                              \
    static void PASTE(gather, t)(int rows, const void *values, const Block *b, const Block *after, int64_t count,  \
                                 int64_t dim, Weights p, float *acc) {                                             \
        enum { type = t };                                                                                         \
        switch (rows) { ALL_GATHERS }                                                                              \
    }
TYPED(F32) TYPED(F16) TYPED(BF16) TYPED(I8)

static void pack_block(const AttentionCall *c, const Block *b, const Block *after, float *packed) {
    switch (c->kv_type) {
    case F16: pack_F16(c->k, b, after, c->dim, packed); break;
    case BF16: pack_BF16(c->k, b, after, c->dim, packed); break;
    case I8: pack_I8(c->k, b, after, c->dim, packed); break;
    default: pack_F32(c->k, b, after, c->dim, packed);
    }
}

static void gather_rows(const AttentionCall *c, int rows, const Block *b, const Block *after, int64_t count, Weights p,
                        float *acc) {
    switch (c->kv_type) {
    case F16: gather_F16(rows, c->v, b, after, count, c->dim, p, acc); break;
    case BF16: gather_BF16(rows, c->v, b, after, count, c->dim, p, acc); break;
    case I8: gather_I8(rows, c->v, b, after, count, c->dim, p, acc); break;
    default: gather_F32(rows, c->v, b, after, count, c->dim, p, acc);
    }
}
