/* A draft model's guesses, several per sequence in one call: read what is new, then choose, read, choose again.
 *
 * Tokens are chosen as the sampler chooses for the target (greedily, or with the same noise), so the two agree wherever
 * their logits do. Everything here may be wrong without harm: the target checks it.
 */
#include <time.h>
#include "simd.h"

typedef struct {
    const Decoder *decoder;
    const int64_t *sequences;   /* [6][n]: tokens to read, position of the first, row of the block tables, guesses wanted
                                 * (1 to depth), key of the noise, index of the first guess in its output; and then, one
                                 * after the other, the tokens to read */
    const double *temperature;  /* [n]; 0: the likeliest token */
    const int32_t *block_table; /* [rows][table_stride] */
    const double *rates;        /* [2 * (num_edges + 1)]: by grade, the chance that a guess is right */
    const float *edges;         /* [num_edges]: probabilities between grades, ascending */
    int64_t *out;               /* [2][n][depth] tokens and grades; [n] guesses made; [n] how many of them were read */
    int64_t *integers;          /* [3 * tokens + n * (10 + table_width) + 2] */
    float *floats;              /* [(tokens + n) * (decoder_scratch + 3 * hidden + vocab)] */
    double *doubles;            /* [1 + n + threads * 3 * blocks of 64 tokens]; the first: seconds after the reading */
    double floor;               /* no further than where the chance that all are right falls below this */
    int64_t n, tokens, depth, table_stride, table_width, num_edges; /* table_width: pages of the longest, guesses too */
    int32_t threads;
} DraftCall;

typedef struct { /* what the levels share */
    const DraftCall *call;
    const Decoder *decoder;
    int64_t *ends;             /* [n]: position of the first guess */
    int32_t *table;            /* [n][table_width] */
    int32_t *query_start, *seq_lens;
    int64_t *positions, *slots, *token_ids, *active, *wanted;
    float *logits, *scratch, *hidden; /* hidden: what the first reading gives */
} Levels;

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

/* Where each token goes, and the step's shape; `ends` are the positions after the last. */
static void lay_out(const Levels *l, const int64_t *lengths, const int64_t *active, int64_t count) {
    const int64_t size = l->decoder->page_size, width = l->call->table_width;
    int64_t at = 0, place = 0;
    for (int64_t s = 0; s < l->call->n; s++) {
        l->query_start[s] = (int32_t)at;
        if (active != 0 && (place == count || active[place] != s)) continue;
        place++;
        const int64_t length = lengths != 0 ? lengths[s] : 1;
        l->seq_lens[s] = (int32_t)l->ends[s];
        for (int64_t position = l->ends[s] - length; position < l->ends[s]; position++, at++) {
            l->positions[at] = position;
            l->slots[at] = l->table[s * width + position / size] * size + position % size;
        }
    }
    l->query_start[l->call->n] = (int32_t)at;
}

/* Read tokens; logits after the last of each sequence. */
static void read_tokens(const Levels *l, const int64_t *token_ids, int64_t tokens, float *out,
                        const int64_t *wanted, int64_t count) {
    const DraftCall *c = l->call;
    const Decoder *d = l->decoder;
    float *rows = l->scratch, *rest = rows + count * d->hidden;
    const DecodeCall call = {d, token_ids, l->positions, l->slots, l->table, l->query_start, l->seq_lens, out, l->scratch,
                             tokens, c->n, c->table_width, c->threads};
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        forward_in_team(&call);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++)
            memcpy(rows + i * d->hidden, out + wanted[i] * d->hidden, d->hidden * sizeof(float));
        multiply_in_team(&d->head, rows, count, l->logits, rest);
    }
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Guess. 0, and nothing done, where a token is outside the vocabulary; else 1. */
EXPORT int NAME(draft)(const DraftCall *c) {
    const Decoder *d = c->decoder;
    const int64_t n = c->n, vocab = d->head.n, blocks = (vocab + BLOCK - 1) / BLOCK;
    const int64_t *lengths = c->sequences, *starts = lengths + n, *rows = starts + n, *limits = rows + n;
    const int64_t *streams = limits + n, *indices = streams + n, *unread = indices + n;
    for (int64_t t = 0; t < c->tokens; t++)
        if (unread[t] < 0 || unread[t] >= d->vocab) return 0;
    const int64_t most_tokens = most(c->tokens, n);
    Levels l = {.call = c, .decoder = d};
    l.positions = c->integers, l.slots = l.positions + most_tokens, l.token_ids = l.slots + most_tokens;
    l.active = l.token_ids + n, l.wanted = l.active + n, l.ends = l.wanted + n;
    l.query_start = (int32_t *)(l.ends + n), l.seq_lens = l.query_start + n + 1, l.table = l.seq_lens + n;
    l.hidden = c->floats, l.logits = l.hidden + most_tokens * d->hidden, l.scratch = l.logits + n * vocab;
    int64_t *tokens_out = c->out, *grades = tokens_out + n * c->depth, *counts = grades + n * c->depth, *read = counts + n;
    double *chance = c->doubles + 1, *noise_scratch = chance + n;
    int64_t at = 0;
    for (int64_t s = 0; s < n; s++) {
        memcpy(l.table + s * c->table_width, c->block_table + rows[s] * c->table_stride, c->table_width * sizeof(int32_t));
        at += lengths[s];
        l.wanted[s] = at - 1;
        l.ends[s] = starts[s] + lengths[s];
        l.active[s] = s;
        chance[s] = 1.0;
        counts[s] = read[s] = 0;
    }
    lay_out(&l, lengths, 0, n);
    read_tokens(&l, unread, c->tokens, l.hidden, l.wanted, n);
    for (int64_t i = 0; i < n; i++) l.wanted[i] = i;
    const double began = now_s();
    int64_t count = n;
    for (int64_t level = 0; count > 0; level++) {
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1 && count > 1)
        for (int64_t a = 0; a < count; a++) {
            const int64_t s = l.active[a], to = s * c->depth + level;
            const float *x = l.logits + a * vocab;
            const double temperature = c->temperature[s];
            if (temperature > 0) {
                const int64_t key = (int64_t)mix((uint64_t)streams[s] + (uint64_t)(indices[s] + level + 1) * GAMMA);
                const DrawCall one = {x, &temperature, &key, 0, 0, 0, 1, vocab, 1};
                tokens_out[to] = draw_row(&one, 0, noise_scratch + (int64_t)omp_get_thread_num() * 3 * blocks);
            } else {
                tokens_out[to] = likeliest(x, vocab);
            }
            if (tokens_out[to] < 0) continue;
            const float p = probability(x, vocab, tokens_out[to], temperature > 0 ? (float)temperature : 1.0f);
            int64_t grade = temperature > 0 ? c->num_edges + 1 : 0;
            for (int64_t e = 0; e < c->num_edges; e++) grade += c->edges[e] < p;
            grades[to] = grade;
        }
        int64_t going = 0;
        for (int64_t a = 0; a < count; a++) {
            const int64_t s = l.active[a], token = tokens_out[s * c->depth + level];
            if (token < 0) continue;
            chance[s] *= c->rates[grades[s * c->depth + level]];
            counts[s] = level + 1;
            if (chance[s] < c->floor || limits[s] <= level + 1) continue;
            read[s] = level + 1;
            l.ends[s]++;
            l.active[going] = s;
            l.token_ids[going++] = token;
        }
        count = going;
        if (count == 0) break;
        lay_out(&l, 0, l.active, count);
        read_tokens(&l, l.token_ids, count, l.hidden, l.wanted, count);
    }
    c->doubles[0] = now_s() - began;
    return 1;
}
