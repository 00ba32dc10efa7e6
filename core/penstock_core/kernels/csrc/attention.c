/* Attention over pages, of prompts as of decodes: blocks of keys against tiles of query rows (attention_tiles.h).
 *
 * One task is some query rows (tokens x heads that share a KV head) of one sequence, or of neighbours that begin with
 * the same pages, which are then read once for all of them. It takes keys in blocks whose places are fixed, asks for
 * the next while it computes one, and keeps the running maximum and sum of FlashAttention (Dao et al., 2022). The order
 * of every sum depends on a token's own position alone, so neither the batch nor the chunking can change a bit.
 */
#include <omp.h>
#include "attention_tiles.h"

#define MOST_ROWS 96     /* of one task; TALL divides it */
#define ROW_FLOATS 12288 /* rows of one task x dim, at most: they stay in the second cache beside a block */
#define SERIAL_ATTENTION 500000 /* multiplications below which a second thread saves less than it may keep us waiting */

typedef struct { /* query rows [from, to) of sequences [first, last), whose first `shared` keys are the same */
    int64_t first, last, shared, from, to, kv_head;
} Task;

typedef struct { /* keys [begin, end), which `rows` rows of a task from `first` on take together */
    const int32_t *table;
    int64_t begin, end, sequence; /* the last one it is of */
    int first, rows;
} Span;

typedef struct { /* the query rows of one task, and what they have gathered so far */
    int rows;
    int64_t position[MOST_ROWS]; /* ascending within a sequence */
    const float *from[MOST_ROWS];
    float *to[MOST_ROWS];
    float top[MOST_ROWS], total[MOST_ROWS];
    float q[ROW_FLOATS] __attribute__((aligned(64)));   /* of the current span, scaled, by tiles: [dim][rows of it] */
    float acc[ROW_FLOATS] __attribute__((aligned(64))); /* [rows][dim] */
} Rows;

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

/* Keys from here on are seen by a token at `position`. */
INLINE int64_t seen_from(const AttentionCall *c, int64_t position) {
    return c->window > 0 && position >= c->window ? position - c->window + 1 : 0;
}

INLINE int64_t query_rows(const AttentionCall *c, int64_t n) {
    return (int64_t)(c->query_start[n + 1] - c->query_start[n]) * (c->heads / c->kv_heads);
}

/* Tokens of a sequence before this step's. */
INLINE int64_t context(const AttentionCall *c, int64_t n) {
    return c->seq_lens[n] - (c->query_start[n + 1] - c->query_start[n]);
}

INLINE const int32_t *table_of(const AttentionCall *c, int64_t n) { return c->block_table + n * c->table_stride; }

/* The rows of one span, as tiles read them. */
static void interleave_span(const AttentionCall *c, Rows *s, const Span *span) {
    const int tiles = (span->rows + TALL - 1) / TALL;
    for (int i = 0; i < tiles; i++) {
        const int first = first_of(i, tiles, span->rows), rows = first_of(i + 1, tiles, span->rows) - first;
        interleave(s->from + span->first + first, rows, c->dim, c->scale, s->q + first * c->dim);
    }
}

static void attend_block(const AttentionCall *c, Rows *s, const Span *span, const Block *b, const Block *after,
                         float *packed) {
    Weights p __attribute__((aligned(64)));
    const int tiles = (span->rows + TALL - 1) / TALL;
    pack_block(c, b, after, packed);
    for (int i = 0; i < tiles; i++) {
        const int first = first_of(i, tiles, span->rows), rows = first_of(i + 1, tiles, span->rows) - first;
        const int from = span->first + first;
        const int64_t count = least(s->position[from + rows - 1] - b->begin + 1, b->count);
        if (count <= 0 || (c->window > 0 && s->position[from] - c->window >= b->begin + KEYS - 1)) continue;
        score_rows(rows, s->q + first * c->dim, packed, count, c->dim, p);
        weigh(c, s, from, rows, b, count, p);
        gather_rows(c, rows, b, after, count, p, s->acc + from * c->dim);
        after = 0; /* asked for */
    }
}

INLINE int alone(const Task *task) { return task->last - task->first == 1; }

/* A task's rows see first what they share, and then what each sequence has of its own. Turns `s` into the next of these
 * spans, or into the first if it has no table yet; 0 where there is none. */
static int next_span(const AttentionCall *c, const Task *task, Span *s) {
    if (s->table == 0) {
        *s = (Span){table_of(c, task->first), 0, task->shared, task->first - 1, 0, (int)(task->to - task->from)};
        if (task->shared > 0) return 1;
    }
    const int64_t group = c->heads / c->kv_heads;
    int first = s->sequence < task->first ? 0 : s->first + s->rows;
    for (int64_t n = s->sequence + 1; n < task->last; n++) {
        const int64_t from = alone(task) ? task->from : 0, to = alone(task) ? task->to : query_rows(c, n);
        const int64_t begin = seen_from(c, context(c, n) + from / group) / KEYS * KEYS;
        *s = (Span){table_of(c, n), most(task->shared, begin), context(c, n) + (to - 1) / group + 1, n, first,
                    (int)(to - from)};
        if (s->begin < s->end) return 1;
        first += s->rows;
    }
    return 0;
}

/* Row r of a sequence is token r / group, head r % group of those that share a KV head. */
static void take_rows(const AttentionCall *c, Rows *s, const Task *task) {
    const int64_t group = c->heads / c->kv_heads, dim = c->dim;
    s->rows = 0;
    for (int64_t n = task->first; n < task->last; n++) {
        const int64_t to = alone(task) ? task->to : query_rows(c, n), start = c->query_start[n];
        for (int64_t row = alone(task) ? task->from : 0; row < to; row++) {
            const int64_t token = row / group, head = task->kv_head * group + row % group;
            s->from[s->rows] = c->q + (start + token) * c->q_stride + head * dim;
            s->to[s->rows] = c->out + ((start + token) * c->heads + head) * dim;
            s->position[s->rows++] = context(c, n) + token;
        }
    }
    memset(s->acc, 0, sizeof(float) * s->rows * dim);
    for (int r = 0; r < s->rows; r++) s->top[r] = -INFINITY, s->total[r] = 0.0f;
}

/* `asked`: whether the first block has been asked for. `next`: the task that this thread takes after it, or null. */
static void attend_task(const AttentionCall *c, const Task *task, int asked, const Task *next) {
    Rows s;
    Span span = {0}, following;
    Block blocks[2];
    float packed[MAX_DIM * KEYS] __attribute__((aligned(64))); /* [dim][KEYS] */
    const int64_t dim = c->dim;
    int here = 0, more = next_span(c, task, &span);
    find_block(c, &blocks[0], span.table, span.begin, span.end, task->kv_head);
    if (!asked) ask_for_block(c, &blocks[0]);
    take_rows(c, &s, task);
    for (; more; span = following) {
        following = span;
        more = next_span(c, task, &following);
        interleave_span(c, &s, &span);
        for (int64_t begin = span.begin; begin < span.end; begin += KEYS, here = !here) {
            Block *after = &blocks[!here];
            Span first = {0};
            if (begin + KEYS < span.end)
                find_block(c, after, span.table, begin + KEYS, span.end, task->kv_head);
            else if (more)
                find_block(c, after, following.table, following.begin, following.end, task->kv_head);
            else if (next != 0 && next_span(c, next, &first))
                find_block(c, after, first.table, first.begin, first.end, next->kv_head);
            else
                *after = blocks[here];
            attend_block(c, &s, &span, &blocks[here], after, packed);
        }
    }
    for (int r = 0; r < s.rows; r++) {
        float *out = s.to[r];
        int64_t d = 0;
        for (; d + VL <= dim; d += VL) store(out + d, div_(load(s.acc + r * dim + d), splat(s.total[r])));
        for (; d < dim; d++) out[d] = s.acc[r * dim + d] / s.total[r];
    }
}

/* How many keys, in whole blocks, two sequences have in common and every row of both sees. */
static int64_t common_keys(const AttentionCall *c, int64_t n, int64_t m) {
    const int32_t *a = table_of(c, n), *b = table_of(c, m);
    const int64_t most_keys = (least(context(c, n), context(c, m)) + 1) / KEYS * KEYS;
    int64_t keys = 0;
    for (int64_t page = 0; keys < most_keys && a[page] == b[page]; page++) keys += c->page_size;
    return least(keys, most_keys) / KEYS * KEYS;
}

typedef struct { /* neighbours that are attended together, and which of all tasks are theirs: [before, after) */
    int64_t first, last, shared, parts, before, after;
} Group;

/* The neighbours from g->last on. `row_limit`: of one task; `together`: sequences of one task. */
static void next_group(const AttentionCall *c, Group *g, int64_t row_limit, int64_t together) {
    const int64_t first = g->last;
    int64_t rows = query_rows(c, first), last = first + 1;
    g->shared = 0;
    if (c->window == 0 && rows > 0)
        for (; last < c->sequences && last - first < together; last++) {
            const int64_t more = query_rows(c, last), keys = more > 0 ? common_keys(c, first, last) : 0;
            if (keys == 0 || keys < g->shared || rows + more > row_limit) break;
            if (g->shared == 0) g->shared = keys;
            rows += more;
        }
    g->first = first, g->last = last;
    g->parts = last - first == 1 ? (rows + row_limit - 1) / row_limit : 1;
    g->before = g->after;
    g->after += g->parts * c->kv_heads;
}

static Task task_of(const AttentionCall *c, const Group *g, int64_t number) {
    Task task = {g->first, g->last, g->shared, 0, 0, (number - g->before) % c->kv_heads};
    for (int64_t n = g->first; n < g->last; n++) task.to += query_rows(c, n);
    if (g->parts > 1) {
        const int64_t part = g->parts - 1 - (number - g->before) / c->kv_heads; /* the last rows see the most keys */
        task.from = part * task.to / g->parts, task.to = (part + 1) * task.to / g->parts;
    }
    return task;
}

/* The calling team's work: every thread of it calls this with the same arguments. */
static void paged_attention_in_team(const AttentionCall *c) {
    const int64_t row_limit = least(ROW_FLOATS / c->dim / TALL * TALL, MOST_ROWS), threads = omp_get_num_threads();
    /* Tasks enough for every thread to have several, so that one that is held up leaves its own to the others; but
     * taken in chunks, for only within one is it known what to ask for next. */
    const int64_t together = c->sequences * c->kv_heads / (4 * threads);
    Group g = {0};
    while (g.last < c->sequences) next_group(c, &g, row_limit, together);
    const int64_t tasks = g.after, chunk = most(1, threads == 1 ? tasks : least(tasks / (4 * threads), 16));
    memset(&g, 0, sizeof g);
#pragma omp for schedule(dynamic, 1)
    for (int64_t taken = 0; taken < (tasks + chunk - 1) / chunk; taken++) {
        const int64_t first = taken * chunk, last = least(first + chunk, tasks);
        if (first < g.before) memset(&g, 0, sizeof g); /* the runtime went back */
        while (first >= g.after) next_group(c, &g, row_limit, together);
        Task task = task_of(c, &g, first);
        for (int64_t number = first; number < last; number++) {
            Task next = task;
            if (number + 1 < last) {
                while (number + 1 >= g.after) next_group(c, &g, row_limit, together);
                next = task_of(c, &g, number + 1);
            }
            attend_task(c, &task, number > first, number + 1 < last ? &next : 0);
            task = next;
        }
    }
}

EXPORT void NAME(paged_attention)(const AttentionCall *c) {
    int64_t work = 0; /* multiplications, of scores and of values */
    for (int64_t n = 0; n < c->sequences; n++)
        work += (int64_t)(c->query_start[n + 1] - c->query_start[n]) * c->seq_lens[n] * 2 * c->heads * c->dim;
#pragma omp parallel num_threads(c->threads) if (work > SERIAL_ATTENTION)
    paged_attention_in_team(c);
}
