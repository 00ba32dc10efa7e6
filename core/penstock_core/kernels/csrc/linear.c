/* Matrix products with weights packed in panels of 32 outputs: out[m][n] = sum over k of x[m][k] w[n][k] (+ bias[n]).
 *
 * A tile is up to TILE rows by one panel, kept in registers over the whole of k; rows are first interleaved so that a tile
 * reads one stream. Every output is one chain of fused multiply-adds in the order of k, so its bits depend neither on the
 * number of rows nor on threads. Weights may be stored in 16 bits and are widened exactly.
 */
#include "simd.h"

#define PANEL 32
#define VECTORS (PANEL / VL)
#define SERIAL_PRODUCT 1000000 /* multiplications below which a second thread saves less than it may keep us waiting */
#if VL == 16
#define TILE 12 /* 24 accumulators of 32 registers */
#elif VL == 8
#define TILE 3 /* 12 of 16 */
#else
#define TILE 1
#endif

typedef struct {
    const void *w;     /* [panels][k][PANEL], zeros beyond n */
    const float *bias; /* [n], or null */
    const float *x;    /* [m][x_stride] */
    float *out;        /* [m][n] */
    float *scratch;    /* [m][k]: the interleaved rows */
    int64_t m, n, k, x_stride;
    int32_t w_type, threads;
} LinearCall;

/* One tile: x is [k][rows] interleaved. `rows` and `type` are constants where this is inlined. */
INLINE void tile(int rows, int type, const float *x, const void *w, int64_t k, float (*out)[PANEL]) {
    vf acc[TILE][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) acc[r][v] = splat(0.0f);
    for (int64_t i = 0; i < k; i++) {
        vf b[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) b[v] = load_as(type, w, i * PANEL + v * VL);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const vf a = splat(x[i * rows + r]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) acc[r][v] = fma_(a, b[v], acc[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) store(out[r] + v * VL, acc[r][v]);
}

#define ROWS_CASE(n)                                   \
    case n: {                                          \
        tile(n, type, x, w, k, out);                   \
    } break;
#if TILE == 12
#define ALL_CASES                                                                                                  \
    ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7) ROWS_CASE(8)        \
    ROWS_CASE(9) ROWS_CASE(10) ROWS_CASE(11) ROWS_CASE(12)
#elif TILE == 3
#define ALL_CASES ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3)
#else
#define ALL_CASES ROWS_CASE(1)
#endif
#define TYPED_TILE(t)                                                                                              \
    static __attribute__((noinline)) void PASTE(tile, t)(int rows, const float *x, const void *w, int64_t k,       \
                                                         float (*out)[PANEL]) {                                    \
        enum { type = t };                                                                                         \
        switch (rows) { ALL_CASES }                                                                                \
    }
TYPED_TILE(F32) TYPED_TILE(F16) TYPED_TILE(BF16)

/* Rows are shared out evenly: tile b of `tiles` has rows [first_row(b), first_row(b + 1)). */
INLINE int64_t first_row(int64_t b, int64_t tiles, int64_t m) { return b * m / tiles; }

/* The calling team's work: every thread of it calls this with the same arguments. */
static void linear_in_team(const LinearCall *c) {
    const int64_t m = c->m, k = c->k, tiles = (m + TILE - 1) / TILE, panels = (c->n + PANEL - 1) / PANEL;
    const int64_t width = c->w_type == F32 ? 4 : 2;
    /* Tiles of one panel are one task while rows are few; more rows give more tasks, for machines with many cores. */
    const int64_t groups = (tiles + 15) / 16;
    if (m > 1) {
#pragma omp for
        for (int64_t b = 0; b < tiles; b++) {
            const int64_t from = first_row(b, tiles, m), rows = first_row(b + 1, tiles, m) - from;
            float *to = c->scratch + from * k;
            for (int64_t r = 0; r < rows; r++) {
                const float *row = c->x + (from + r) * c->x_stride;
                for (int64_t i = 0; i < k; i++) to[i * rows + r] = row[i];
            }
        }
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < panels * groups; task++) {
        const int64_t panel = task / groups, group = task % groups, column = panel * PANEL;
        const char *w = (const char *)c->w + panel * PANEL * k * width;
        const int64_t columns = c->n - column < PANEL ? c->n - column : PANEL;
        for (int64_t b = group * tiles / groups; b < (group + 1) * tiles / groups; b++) {
            const int64_t from = first_row(b, tiles, m), rows = first_row(b + 1, tiles, m) - from;
            const float *x = m > 1 ? c->scratch + from * k : c->x;
            float sums[TILE][PANEL] __attribute__((aligned(64)));
            switch (c->w_type) {
            case F16: tile_F16((int)rows, x, w, k, sums); break;
            case BF16: tile_BF16((int)rows, x, w, k, sums); break;
            default: tile_F32((int)rows, x, w, k, sums);
            }
            for (int64_t r = 0; r < rows; r++) {
                float *out = c->out + (from + r) * c->n + column;
                if (c->bias != 0)
                    for (int64_t j = 0; j < columns; j++) out[j] = sums[r][j] + c->bias[column + j];
                else
                    memcpy(out, sums[r], columns * sizeof(float));
            }
        }
    }
}

EXPORT void NAME(linear)(const LinearCall *c) {
#pragma omp parallel num_threads(c->threads) if (c->m * c->n * c->k > SERIAL_PRODUCT && c->threads > 1)
    linear_in_team(c);
}
