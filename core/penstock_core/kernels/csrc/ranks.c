/* Collectives among the ranks of one host, through memory that all of them map.
 *
 * Every rank makes the same calls in the same order and numbers its steps alike; a large call is several steps. Each
 * rank has two slots, used in turn, so a rank may be one step ahead of its readers: step k is written once every
 * reader is done with step k - 2. A wait spins for a while, then sleeps on a futex; while asleep it looks whether the
 * one it waits for still lives: every rank holds a lock on one byte of the segment's file, which the kernel lets go of
 * when the process ends, however it ends.
 */
#if defined(__linux__)
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef F_OFD_GETLK
#define F_OFD_GETLK 36 /* fcntl.h names it under _GNU_SOURCE only */
#endif

enum { RANKS_OK = 0, RANKS_TIMED_OUT = 1, RANKS_GONE = 2 };
enum { CONTROL_BYTES = 64, CHECK_NS = 10000000 };

typedef struct { /* one rank's line of the segment's head; counters wrap around */
    uint32_t written; /* steps whose data this rank has made available */
    uint32_t done;    /* steps that this rank needs nothing of any more */
    uint32_t sleepers;
    uint8_t rest[CONTROL_BYTES - 12];
} ranks_line;

typedef struct { /* as in native.py */
    uint8_t *base;
    int64_t slot_bytes, spin_ns, timeout_ns;
    int32_t fd, rank, size;
    uint32_t step;
    int32_t lost; /* out: the rank that was waited for in vain */
} ranks_call;

INLINE ranks_line *line_of(const ranks_call *c, int rank) { return (ranks_line *)(c->base + rank * CONTROL_BYTES); }

INLINE int64_t head_bytes(const ranks_call *c) { return (c->size * CONTROL_BYTES + 4095) / 4096 * 4096; }

INLINE uint8_t *slot_of(const ranks_call *c, int rank, uint32_t step) {
    return c->base + head_bytes(c) + (rank * 2 + (step & 1)) * c->slot_bytes;
}

INLINE int reached(const uint32_t *counter, uint32_t step) {
    return (int32_t)(__atomic_load_n(counter, __ATOMIC_ACQUIRE) - step) >= 0;
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int is_alive(const ranks_call *c, int rank) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
    return fcntl(c->fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

static void advance(const ranks_call *c, uint32_t *counter, uint32_t step) {
    uint32_t *sleepers = &line_of(c, c->rank)->sleepers;
    __atomic_store_n(counter, step, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(sleepers, __ATOMIC_SEQ_CST)) syscall(SYS_futex, counter, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Wait until a rank's counter reaches a step. */
static int await(ranks_call *c, int rank, uint32_t *counter, uint32_t step) {
    ranks_line *line = line_of(c, rank);
    int64_t started, now;
    int result = RANKS_OK;
    if (reached(counter, step)) return RANKS_OK;
    started = now = now_ns();
    while (now - started < c->spin_ns) {
        for (int i = 0; i < 64; i++) {
            if (reached(counter, step)) return RANKS_OK;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        now = now_ns();
    }
    __atomic_add_fetch(&line->sleepers, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint32_t seen = __atomic_load_n(counter, __ATOMIC_SEQ_CST);
        struct timespec slice = {0, CHECK_NS};
        if ((int32_t)(seen - step) >= 0) break;
        if (syscall(SYS_futex, counter, FUTEX_WAIT, seen, &slice, NULL, 0) != 0 && errno == ETIMEDOUT) {
            int alive = is_alive(c, rank); /* before the counter: it may have ended right after its last step */
            if (reached(counter, step)) break;
            if (!alive) {
                result = RANKS_GONE;
                break;
            }
            if (now_ns() - started > c->timeout_ns) {
                result = RANKS_TIMED_OUT;
                break;
            }
        }
    }
    __atomic_sub_fetch(&line->sleepers, 1, __ATOMIC_SEQ_CST);
    if (result != RANKS_OK) c->lost = rank;
    return result;
}

/* Begin a step: count it, and wait until my slot of two steps ago has been read by everybody. */
static int begin(ranks_call *c) {
    c->step++;
    for (int rank = 0; rank < c->size; rank++) {
        int result = rank == c->rank ? RANKS_OK : await(c, rank, &line_of(c, rank)->done, c->step - 2);
        if (result != RANKS_OK) return result;
    }
    return RANKS_OK;
}

INLINE int written(ranks_call *c, int rank) { return await(c, rank, &line_of(c, rank)->written, c->step); }


/* Sum over ranks into `data` on all of them; ranks are added in order, so that all get the same bits. */
EXPORT int NAME(ranks_all_reduce)(ranks_call *c, float *data, int64_t count) {
    ranks_line *mine = line_of(c, c->rank);
    int64_t most = c->slot_bytes / 4;
    for (int64_t start = 0; start < count; start += most) {
        int64_t n = least(most, count - start);
        int result = begin(c);
        if (result != RANKS_OK) return result;
        memcpy(slot_of(c, c->rank, c->step), data + start, n * 4);
        advance(c, &mine->written, c->step);
        if ((result = written(c, 0)) != RANKS_OK) return result;
        const float *total = (const float *)slot_of(c, 0, c->step);
        for (int rank = 1; rank < c->size; rank++) {
            const float *next = (const float *)slot_of(c, rank, c->step);
            int64_t i = 0;
            if ((result = written(c, rank)) != RANKS_OK) return result;
            for (; i + VL <= n; i += VL) store(data + start + i, add(load(total + i), load(next + i)));
            for (; i < n; i++) data[start + i] = total[i] + next[i];
            total = data + start;
        }
        advance(c, &mine->done, c->step);
    }
    return RANKS_OK;
}

/* Rows of every rank, side by side in `out` [rows, size * row_bytes] of rank 0; the others' `out` is not used. */
EXPORT int NAME(ranks_gather)(ranks_call *c, const uint8_t *part, uint8_t *out, int64_t rows, int64_t row_bytes) {
    ranks_line *mine = line_of(c, c->rank);
    int64_t total = rows * row_bytes;
    for (int64_t start = 0; start < total; start += c->slot_bytes) {
        int64_t n = least(c->slot_bytes, total - start);
        int result = begin(c);
        if (result != RANKS_OK) return result;
        if (c->rank != 0) memcpy(slot_of(c, c->rank, c->step), part + start, n);
        advance(c, &mine->written, c->step);
        for (int rank = 0; c->rank == 0 && rank < c->size; rank++) {
            const uint8_t *from = rank == 0 ? part + start : slot_of(c, rank, c->step);
            if (rank != 0 && (result = written(c, rank)) != RANKS_OK) return result;
            for (int64_t at = start; at < start + n;) {
                int64_t row = at / row_bytes, column = at % row_bytes;
                int64_t length = least(row_bytes - column, start + n - at);
                memcpy(out + (row * c->size + rank) * row_bytes + column, from + (at - start), length);
                at += length;
            }
        }
        advance(c, &mine->done, c->step);
    }
    return RANKS_OK;
}

/* Bytes of rank 0 to all others. */
EXPORT int NAME(ranks_broadcast)(ranks_call *c, uint8_t *data, int64_t bytes) {
    ranks_line *mine = line_of(c, c->rank);
    for (int64_t start = 0; start < bytes; start += c->slot_bytes) {
        int64_t n = least(c->slot_bytes, bytes - start);
        int result = c->rank == 0 ? begin(c) : (c->step++, written(c, 0));
        if (result != RANKS_OK) return result;
        memcpy(c->rank == 0 ? slot_of(c, 0, c->step) : data + start,
               c->rank == 0 ? data + start : slot_of(c, 0, c->step), n);
        if (c->rank == 0) advance(c, &mine->written, c->step);
        else __atomic_store_n(&mine->written, c->step, __ATOMIC_SEQ_CST); /* nobody waits for what a reader writes */
        advance(c, &mine->done, c->step);
    }
    return RANKS_OK;
}

/* The first rank that is not there any more, or -1. */
EXPORT int NAME(ranks_lost)(const ranks_call *c) {
    for (int rank = 0; rank < c->size; rank++)
        if (rank != c->rank && !is_alive(c, rank)) return rank;
    return -1;
}
#endif
