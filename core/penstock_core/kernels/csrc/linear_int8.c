/* Matrix products in 8 bits: weights rounded per output, activations per row, their products summed exactly in 32 bits.
 *
 * VNNI multiplies unsigned by signed bytes, so weights are stored plus 128 and 128 times the sum of the row's activations
 * is taken off again. Sums of integers are exact: no batch, tile or thread can change them.
 */
#include "simd.h"

#if defined(__AVX512VNNI__)
#define I8_TILE 12
#define I8_PANEL 32

typedef struct {
    const uint8_t *w;     /* [panels][k4][I8_PANEL][4]: rounded weight + 128; k4 = ceil(k / 4) */
    const float *w_scale; /* [n] */
    const float *bias;    /* [n], or null */
    const float *x;       /* [m][x_stride] */
    float *out;           /* [m][n] */
    int8_t *rounded;      /* scratch [m][k4 * 4], interleaved by tiles */
    float *x_scale;       /* scratch [m] */
    int32_t *x_sum;       /* scratch [m] */
    int64_t m, n, k, x_stride;
    int32_t threads;
} Int8LinearCall;

/* One tile: x is [k4][rows][4]. */
INLINE void tile_int8(int rows, const int8_t *x, const uint8_t *w, int64_t k4, int32_t (*out)[I8_PANEL]) {
    __m512i low[I8_TILE], high[I8_TILE];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < k4; i++) {
        const __m512i a = _mm512_loadu_si512(w + i * I8_PANEL * 4), b = _mm512_loadu_si512(w + i * I8_PANEL * 4 + 64);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + (i * rows + r) * 4, 4);
            const __m512i y = _mm512_set1_epi32(four);
            low[r] = _mm512_dpbusd_epi32(low[r], a, y);
            high[r] = _mm512_dpbusd_epi32(high[r], b, y);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_si512(out[r], low[r]);
        _mm512_storeu_si512(out[r] + 16, high[r]);
    }
}

#define I8_CASE(n) case n: tile_int8(n, x, w, k4, out); break;
static void tile_int8_rows(int rows, const int8_t *x, const uint8_t *w, int64_t k4, int32_t (*out)[I8_PANEL]) {
    switch (rows) {
        I8_CASE(1) I8_CASE(2) I8_CASE(3) I8_CASE(4) I8_CASE(5) I8_CASE(6) I8_CASE(7) I8_CASE(8) I8_CASE(9) I8_CASE(10)
        I8_CASE(11) I8_CASE(12)
    }
}

/* Round one row to its own scale, into place r of a tile of `rows`. */
static void round_row(const float *x, int64_t k, int64_t rows, int64_t r, int8_t *to, float *scale, int32_t *total) {
    vf high = splat(0.0f);
    int64_t i = 0;
    for (; i + VL <= k; i += VL) high = max_(high, abs_(load(x + i)));
    float top = largest(high);
    for (; i < k; i++) top = fmaxf(top, fabsf(x[i]));
    *scale = top > 0 ? top / 127 : 1.0f;
    const float inverse = 1.0f / *scale;
    int32_t added = 0;
    for (i = 0; i + 16 <= k; i += 16) {
        const __m512i whole = _mm512_cvtps_epi32(mul(load(x + i), splat(inverse)));
        int8_t bytes[16];
        _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8(whole));
        for (int j = 0; j < 4; j++) memcpy(to + ((i / 4 + j) * rows + r) * 4, bytes + 4 * j, 4);
        added += _mm512_reduce_add_epi32(whole);
    }
    for (; i < (k + 3) / 4 * 4; i += 4) {
        int8_t *four = to + (i / 4 * rows + r) * 4;
        for (int j = 0; j < 4; j++) {
            four[j] = i + j < k ? (int8_t)lrintf(x[i + j] * inverse) : 0;
            added += four[j];
        }
    }
    *total = added;
}

/* The calling team's work, as in linear.c. */
static void linear_int8_in_team(const Int8LinearCall *c) {
    const int64_t m = c->m, k4 = (c->k + 3) / 4, tiles = (m + I8_TILE - 1) / I8_TILE;
    const int64_t panels = (c->n + I8_PANEL - 1) / I8_PANEL, groups = (tiles + 15) / 16;
#pragma omp for
    for (int64_t row = 0; row < m; row++) {
        int64_t b = row * tiles / m; /* the tile it is in */
        while (first_row(b + 1, tiles, m) <= row) b++;
        const int64_t from = first_row(b, tiles, m), rows = first_row(b + 1, tiles, m) - from;
        round_row(c->x + row * c->x_stride, c->k, rows, row - from, c->rounded + from * k4 * 4, c->x_scale + row,
                  c->x_sum + row);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < panels * groups; task++) {
        const int64_t panel = task / groups, group = task % groups, column = panel * I8_PANEL;
        const uint8_t *w = c->w + panel * I8_PANEL * k4 * 4;
        const int64_t columns = c->n - column < I8_PANEL ? c->n - column : I8_PANEL;
        for (int64_t b = group * tiles / groups; b < (group + 1) * tiles / groups; b++) {
            const int64_t from = first_row(b, tiles, m), rows = first_row(b + 1, tiles, m) - from;
            int32_t sums[I8_TILE][I8_PANEL] __attribute__((aligned(64)));
            tile_int8_rows((int)rows, c->rounded + from * k4 * 4, w, k4, sums);
            for (int64_t r = 0; r < rows; r++) {
                const int32_t shift = 128 * c->x_sum[from + r];
                const float scale = c->x_scale[from + r];
                const float *w_scale = c->w_scale + column;
                float *out = c->out + (from + r) * c->n + column;
                for (int64_t j = 0; j < columns; j += VL) {
                    const __mmask16 kept = columns - j < VL ? (__mmask16)((1 << (columns - j)) - 1) : (__mmask16)-1;
                    const __m512i whole = _mm512_sub_epi32(_mm512_load_si512(sums[r] + j), _mm512_set1_epi32(shift));
                    vf y = mul(_mm512_cvtepi32_ps(whole), mul(splat(scale), _mm512_maskz_loadu_ps(kept, w_scale + j)));
                    if (c->bias != 0) y = add(y, _mm512_maskz_loadu_ps(kept, c->bias + column + j));
                    _mm512_mask_storeu_ps(out + j, kept, y);
                }
            }
        }
    }
}

EXPORT void NAME(linear_int8)(const Int8LinearCall *c) {
#pragma omp parallel num_threads(c->threads) if (c->m * c->n * c->k > 4 * SERIAL_PRODUCT && c->threads > 1)
    linear_int8_in_team(c);
}
#endif
