/* The draw over a whole vocabulary: sampling/race.py, with the same noise and the same token, bit for bit.
 *
 * Scores and noise are single IEEE double operations in the order of noise.py, so the build must not contract them.
 */
#include <omp.h>
#include "simd.h"

#define BLOCK 64
#define MISSING (-INFINITY)

typedef struct {
    const float *logits; /* [rows][vocab] */
    const double *temperature;
    const int64_t *keys;
    const float *floors; /* [rows], or null */
    double *scratch;     /* [threads][3 * blocks] */
    int64_t *tokens;     /* [rows]: chosen, or -1 where no logit is finite or one is NaN or infinite */
    int64_t rows, vocab;
    int32_t threads;
} DrawCall;

INLINE uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

INLINE double as_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

INLINE double log_(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    const int64_t k = (bits - 0x3FE6A09E667F3BCD) >> 52;
    const double m = as_double((uint64_t)bits - ((uint64_t)k << 52));
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double series = z * (2.0 / 13) + 2.0 / 11;
    series = series * z + 2.0 / 9;
    series = series * z + 2.0 / 7;
    series = series * z + 2.0 / 5;
    series = series * z + 2.0 / 3;
    series = series * z + 2.0;
    return series * s + (double)k * 0.6931471805599453;
}

INLINE double exponential(uint64_t hashed) {
    return -log_(as_double(hashed >> 12 | 0x3FF0000000000000u) - (1.0 - 0x1p-53));
}

#define GAMMA 0x9E3779B97F4A7C15u

/* The best token of one block that beats (score, token), which are updated. */
INLINE void look_into(const float *x, int64_t count, int64_t first, double temperature, uint64_t key, double minimum,
                      double ease, float floor, double *score, int64_t *token) {
    const int64_t member = (int64_t)(mix(key + ((uint64_t)(first / BLOCK) + ((uint64_t)1 << 40)) * GAMMA) & (BLOCK - 1));
    for (int64_t i = 0; i < count; i++) {
        if (!(x[i] >= floor) || x[i] == MISSING) continue;
        const double warm = (double)x[i] / temperature;
        if (warm - ease < *score) continue; /* even the block's least noise would not do */
        double noise = minimum;
        if (i != member) noise = minimum + exponential(mix(key + (uint64_t)(first + i) * GAMMA));
        const double mine = warm - log_(noise);
        if (mine > *score || (mine == *score && first + i < *token)) *score = mine, *token = first + i;
    }
}

static int64_t draw_row(const DrawCall *call, int64_t row, double *bound) {
    const int64_t vocab = call->vocab, blocks = (vocab + BLOCK - 1) / BLOCK;
    const float *x = call->logits + row * vocab;
    const float floor = call->floors ? call->floors[row] : MISSING;
    const double temperature = call->temperature[row];
    const uint64_t key = (uint64_t)call->keys[row];
    double *minimum = bound + blocks, *ease = minimum + blocks;
    int strange = 0;
    for (int64_t b = 0; b < blocks; b++) {
        const float *inside = x + b * BLOCK;
        const int64_t count = vocab - b * BLOCK < BLOCK ? vocab - b * BLOCK : BLOCK;
        float most = MISSING;
        for (int64_t i = 0; i < count; i++) {
            most = inside[i] > most ? inside[i] : most;
            strange |= !(inside[i] < INFINITY); /* NaN or infinite */
        }
        bound[b] = most;
    }
    if (strange) return -1;
#pragma omp simd
    for (int64_t b = 0; b < blocks; b++) {
        minimum[b] = exponential(mix(key + ((uint64_t)b + ((uint64_t)1 << 40)) * GAMMA)) * (1.0 / BLOCK);
        ease[b] = log_(minimum[b]);
        bound[b] = bound[b] >= floor ? bound[b] / temperature - ease[b] : MISSING;
    }
    int64_t best = 0, token = -1;
    double score = MISSING;
    for (int64_t b = 1; b < blocks; b++)
        if (bound[b] > bound[best]) best = b;
    for (int64_t n = -1; n < blocks; n++) { /* the most promising block first, then those that might beat it */
        const int64_t b = n < 0 ? best : n;
        if (n == best || bound[b] == MISSING || bound[b] < score) continue;
        const int64_t count = vocab - b * BLOCK < BLOCK ? vocab - b * BLOCK : BLOCK;
        look_into(x + b * BLOCK, count, b * BLOCK, temperature, key, minimum[b], ease[b], floor, &score, &token);
    }
    return token;
}

EXPORT void NAME(draw)(const DrawCall *call) {
    const int64_t blocks = (call->vocab + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(call->threads) if (call->rows > 1 && call->rows * call->vocab > 65536)
    {
        double *scratch = call->scratch + (int64_t)omp_get_thread_num() * 3 * blocks;
#pragma omp for
        for (int64_t row = 0; row < call->rows; row++) call->tokens[row] = draw_row(call, row, scratch);
    }
}
