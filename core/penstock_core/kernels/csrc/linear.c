/* Matrix products with weights packed in panels of 32 outputs: out[m][n] = sum over k of x[m][k] w[n][k] (+ bias[n]).
 *
 * A tile is up to TILE rows by one panel, kept in registers over the whole of k; rows are first interleaved so that a tile
 * reads one stream. Every output is one chain of fused multiply-adds in the order of k, so its bits depend neither on the
 * number of rows nor on threads. Weights may be stored in 16 bits and are widened exactly.
 */
#include <omp.h>
#include "simd.h"

#define PANEL 32
#define VECTORS (PANEL / VL)
#define AHEAD 6144 /* bytes from where a panel's only tile reads to where it asks */
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

typedef struct { /* weights to ask for meanwhile: two lines for each number of k, `step` bytes after the last two */
    const char *from;
    int64_t step;
} Ahead;

/* One tile of one panel, or of two that lie together: x is [k][rows] interleaved, out [panels][rows]. A row alone keeps
 * too few sums going to fill the pipeline, so few rows take two panels. All but x, w and k are constants where this is
 * inlined. */
INLINE void tile(int rows, int panels, int type, const float *x, const void *w, int64_t k, Ahead ahead,
                 float (*out)[PANEL]) {
    vf acc[2][TILE][VECTORS];
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) acc[p][r][v] = splat(0.0f);
    for (int64_t i = 0; i < k; i++) {
        vf b[2][VECTORS];
        if (panels == 1) {
            __builtin_prefetch(ahead.from + i * ahead.step, 0, 2);
            __builtin_prefetch(ahead.from + i * ahead.step + 64, 0, 2);
        }
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) b[p][v] = load_as(type, w, (p * k + i) * PANEL + v * VL);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const vf a = splat(x[i * rows + r]);
#pragma GCC unroll 2
            for (int p = 0; p < panels; p++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) acc[p][r][v] = fma_(a, b[p][v], acc[p][r][v]);
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) store(out[p * rows + r] + v * VL, acc[p][r][v]);
}

#define ONE(n) \
    case n: tile(n, 1, type, x, w, k, ahead, out); break;
#define PAIR(n) \
    case TILE + n: tile(n, 2, type, x, w, k, ahead, out); break;
#if TILE == 12
#define PAIRED 6 /* rows up to which two panels are taken at once */
#define ALL_CASES                                                                                                  \
    ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12)                         \
    PAIR(1) PAIR(2) PAIR(3) PAIR(4) PAIR(5) PAIR(6)
#elif TILE == 3
#define PAIRED 1
#define ALL_CASES ONE(1) ONE(2) ONE(3) PAIR(1)
#else
#define PAIRED 0
#define ALL_CASES ONE(1)
#endif
#define TYPED_TILE(t)                                                                                              \
    static __attribute__((noinline)) void PASTE(tile, t)(int rows, int panels, const float *x, const void *w,      \
                                                         int64_t k, Ahead ahead, float (*out)[PANEL]) {            \
        enum { type = t };                                                                                         \
        switch ((panels - 1) * TILE + rows) { ALL_CASES }                                                          \
    }
TYPED_TILE(F32) TYPED_TILE(F16) TYPED_TILE(BF16)

/* Rows are shared out evenly: tile b of `tiles` has rows [first_row(b), first_row(b + 1)). */
INLINE int64_t first_row(int64_t b, int64_t tiles, int64_t m) { return b * m / tiles; }

/* What a panel's tile b of `tiles` asks for: its part of the next panel, for the first would wait for memory that the
 * others leave idle; or, alone with its panel, a little further on in it. */
INLINE Ahead ahead_of(const char *w, int64_t k, int64_t width, int64_t b, int64_t tiles, int is_last) {
    if (tiles == 1) return (Ahead){w + AHEAD, PANEL * width};
    if (is_last) return (Ahead){w, 0};
    const int64_t step = PANEL * width / tiles;
    return (Ahead){w + (PANEL * width + b * step) * k, step};
}

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
            const float *row[TILE];
            for (int64_t r = 0; r < rows; r++) row[r] = c->x + (from + r) * c->x_stride;
            interleave(row, (int)rows, k, 1.0f, c->scratch + from * k);
        }
    }
    const int64_t tasks = panels * groups, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t end = (thread + 1) * tasks / threads;
    for (int64_t task = thread * tasks / threads; task < end;) {
        const int pair = m <= PAIRED && task + 1 < end ? 2 : 1;
        const int64_t panel = task / groups, group = task % groups, column = panel * PANEL;
        const char *w = (const char *)c->w + panel * PANEL * k * width;
        const int64_t first = group * tiles / groups, last = (group + 1) * tiles / groups;
        for (int64_t b = first; b < last; b++) {
            const Ahead ahead = ahead_of(w, k, width, b - first, last - first, task + 1 == end);
            const int64_t from = first_row(b, tiles, m), rows = first_row(b + 1, tiles, m) - from;
            const float *x = m > 1 ? c->scratch + from * k : c->x;
            float sums[TILE][PANEL] __attribute__((aligned(64)));
            switch (c->w_type) {
            case F16: tile_F16((int)rows, pair, x, w, k, ahead, sums); break;
            case BF16: tile_BF16((int)rows, pair, x, w, k, ahead, sums); break;
            default: tile_F32((int)rows, pair, x, w, k, ahead, sums);
            }
            for (int64_t r = 0; r < pair * rows; r++) {
                const int64_t at = column + r / rows * PANEL, columns = c->n - at < PANEL ? c->n - at : PANEL;
                float *out = c->out + (from + r % rows) * c->n + at;
                int64_t j = 0;
                for (; j + VL <= columns; j += VL) {
                    const vf y = load(sums[r] + j);
                    store(out + j, c->bias != 0 ? add(y, load(c->bias + at + j)) : y);
                }
                for (; j < columns; j++) out[j] = c->bias != 0 ? sums[r][j] + c->bias[at + j] : sums[r][j];
            }
        }
        task += pair;
    }
#pragma omp barrier
}

EXPORT void NAME(linear)(const LinearCall *c) {
#pragma omp parallel num_threads(c->threads) if (c->m * c->n * c->k > SERIAL_PRODUCT && c->threads > 1)
    linear_in_team(c);
}
