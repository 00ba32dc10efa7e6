/* A draft model's guesses, several per sequence in one call: read what is new, then choose, read, choose again.
 *
 * Tokens are chosen as the sampler chooses for the target (greedily, or with the same noise), so the two agree wherever
 * their logits do. Everything here may be wrong without harm: the target checks it.
 */
#include <time.h>
#include "simd.h"

typedef struct {
    const DecodeCall *first;    /* reads what is new */
    const int64_t *wanted;      /* [n]: its rows after which guessing starts, one for each sequence */
    float *logits;              /* [n][vocab], working memory */
    const double *temperature;  /* [n]; 0: the likeliest token */
    const int64_t *keys;        /* [depth][n]: noise of each position */
    const int64_t *limits;      /* [n]: guesses wanted, 1 to depth */
    const int64_t *starts;      /* [n]: position of the first guess */
    const int32_t *block_table; /* [n][table_stride] */
    const double *rates;        /* [2 * (num_edges + 1)]: by grade, the chance that a guess is right */
    const float *edges;         /* [num_edges]: probabilities between grades, ascending */
    int64_t *tokens, *grades;   /* out [n][depth] */
    int64_t *counts, *read;     /* out [n]: guesses made, and how many of them were read */
    double *guessing_s;         /* out: seconds after the first reading */
    float *scratch;             /* [n * (decoder_scratch + 2 * hidden)]; may be that of `first` */
    double *doubles;            /* [n * 2 + threads * 3 * blocks of 64 tokens] */
    int64_t *integers;          /* [n * 6 + 1] */
    double floor;               /* no further than where the chance that all are right falls below this */
    int64_t n, depth, table_stride, num_edges;
    int32_t threads;
} DraftCall;

/* The likeliest token, the first of equals; -1 where a logit is not finite. */
static int64_t likeliest(const float *x, int64_t vocab) {
    vf highs = splat(-INFINITY), zeros = splat(0.0f);
    int64_t i = 0;
    for (; i + VL <= vocab; i += VL) {
        highs = max_(highs, load(x + i));
        zeros = fma_(load(x + i), splat(0.0f), zeros); /* NaN, if any is infinite or NaN */
    }
    float high = largest(highs), zero = sum(zeros);
    for (; i < vocab; i++) {
        high = x[i] > high ? x[i] : high;
        zero += x[i] * 0.0f;
    }
    if (zero != 0.0f) return -1;
    for (i = 0; x[i] != high;) i++;
    return i;
}

/* Its probability in softmax(x / temperature). */
static float probability(const float *x, int64_t vocab, int64_t token, float temperature) {
    const float inverse = 1.0f / temperature;
    vf total = splat(0.0f);
    int64_t i = 0;
    for (; i + VL <= vocab; i += VL) total = add(total, exp_(mul(sub(load(x + i), splat(x[token])), splat(inverse))));
    float all = sum(total);
    for (; i < vocab; i++) all += expf((x[i] - x[token]) * inverse);
    return 1.0f / all;
}

/* Read the tokens of the active sequences, and compute the logits after them. */
static void read_guesses(const DraftCall *c, const int64_t *active, int64_t count, int64_t level, const int64_t *token_ids) {
    const Decoder *d = c->first->decoder;
    int64_t *positions = c->integers + 2 * c->n, *slots = positions + c->n;
    int32_t *query_start = (int32_t *)(slots + c->n), *seq_lens = query_start + c->n + 1;
    int64_t at = 0;
    for (int64_t s = 0; s < c->n; s++) {
        query_start[s] = (int32_t)at;
        seq_lens[s] = (int32_t)(c->starts[s] + level + 1);
        if (at < count && active[at] == s) {
            const int64_t position = positions[at] = c->starts[s] + level;
            const int64_t page = c->block_table[s * c->table_stride + position / d->page_size];
            slots[at] = page * d->page_size + position % d->page_size;
            at++;
        }
    }
    query_start[c->n] = (int32_t)at;
    float *hidden = c->scratch, *rows = hidden + count * d->hidden, *rest = rows + count * d->hidden;
    const DecodeCall call = {d, token_ids, positions, slots, c->block_table, query_start, seq_lens, hidden, rest,
                             count, c->n, c->table_stride, 1, c->threads};
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        forward_in_team(&call);
        multiply_in_team(&d->head, hidden, count, c->logits, d->head.type == I8 ? rest : rows);
    }
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void read_what_is_new(const DraftCall *c) {
    const Decoder *d = c->first->decoder;
    float *hidden = c->scratch, *rest = hidden + c->n * d->hidden;
#pragma omp parallel num_threads(c->first->threads) if (c->first->threads > 1)
    {
        forward_in_team(c->first);
#pragma omp for schedule(static)
        for (int64_t s = 0; s < c->n; s++)
            memcpy(hidden + s * d->hidden, c->first->out + c->wanted[s] * d->hidden, d->hidden * sizeof(float));
        multiply_in_team(&d->head, hidden, c->n, c->logits, rest);
    }
}

/* 0, and nothing done, where a token is outside the vocabulary; else 1. */
EXPORT int NAME(draft)(const DraftCall *c) {
    if (!all_known(c->first)) return 0;
    read_what_is_new(c);
    const double began = now_s();
    const int64_t vocab = c->first->decoder->head.n, blocks = (vocab + BLOCK - 1) / BLOCK;
    int64_t *active = c->integers, *token_ids = active + c->n;
    double *chance = c->doubles, *noise_scratch = chance + 2 * c->n;
    int64_t count = c->n;
    for (int64_t s = 0; s < c->n; s++) {
        active[s] = s;
        chance[s] = 1.0;
        c->counts[s] = c->read[s] = 0;
    }
    for (int64_t level = 0; count > 0; level++) {
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1 && count > 1)
        for (int64_t a = 0; a < count; a++) {
            const int64_t s = active[a];
            const float *x = c->logits + a * vocab;
            const double temperature = c->temperature[s];
            int64_t token;
            if (temperature > 0) {
                double *mine = noise_scratch + (int64_t)omp_get_thread_num() * 3 * blocks;
                const DrawCall one = {x, &temperature, c->keys + level * c->n + s, 0, 0, 0, 1, vocab, 1};
                token = draw_row(&one, 0, mine);
            } else {
                token = likeliest(x, vocab);
            }
            c->tokens[s * c->depth + level] = token;
            if (token < 0) continue;
            const float p = probability(x, vocab, token, temperature > 0 ? (float)temperature : 1.0f);
            int64_t grade = temperature > 0 ? c->num_edges + 1 : 0;
            for (int64_t e = 0; e < c->num_edges; e++) grade += c->edges[e] < p;
            c->grades[s * c->depth + level] = grade;
        }
        int64_t going = 0;
        for (int64_t a = 0; a < count; a++) {
            const int64_t s = active[a], token = c->tokens[s * c->depth + level];
            if (token < 0) continue;
            chance[s] *= c->rates[c->grades[s * c->depth + level]];
            c->counts[s] = level + 1;
            if (chance[s] < c->floor || c->limits[s] <= level + 1) continue;
            c->read[s] = level + 1;
            active[going] = s;
            token_ids[going++] = token;
        }
        count = going;
        if (count > 0) read_guesses(c, active, count, level, token_ids);
    }
    *c->guessing_s = now_s() - began;
    return 1;
}
