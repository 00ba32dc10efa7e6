/* The part of OpenMP's runtime that the kernels use, on plain pthreads: ThreadSanitizer sees every lock of it.
 *
 * gcc's own runtime waits on futexes that the sanitizer does not know, so every barrier of it looks like a race. Nested
 * teams, which the kernels do not have, are not supported.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#define MOST 16

typedef struct {
    pthread_mutex_t lock;
    pthread_barrier_t barrier;
    int size;
    long next, end, chunk; /* the dynamic loop that is being shared out */
    int inside;            /* threads that have begun it */
} Team;

typedef struct {
    void (*work)(void *);
    void *data;
    Team *team;
    int number;
} Member;

static __thread Team *team;
static __thread int number;

int omp_get_thread_num(void) { return number; }
int omp_get_num_threads(void) { return team ? team->size : 1; }

static void *run(void *argument) {
    const Member *member = argument;
    team = member->team;
    number = member->number;
    member->work(member->data);
    return 0;
}

void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    Team mine = {.size = threads == 0 ? 2 : threads > MOST ? MOST : (int)threads};
    Member members[MOST];
    pthread_t others[MOST];
    pthread_mutex_init(&mine.lock, 0);
    pthread_barrier_init(&mine.barrier, 0, mine.size);
    for (int i = 0; i < mine.size; i++) {
        members[i] = (Member){work, data, &mine, i};
        if (i > 0 && pthread_create(&others[i], 0, run, &members[i]) != 0) abort();
    }
    run(&members[0]);
    for (int i = 1; i < mine.size; i++) pthread_join(others[i], 0);
    team = 0;
    number = 0;
    pthread_barrier_destroy(&mine.barrier);
    pthread_mutex_destroy(&mine.lock);
}

static bool barriers = true;
__attribute__((constructor)) static void look(void) { barriers = getenv("WITHOUT_BARRIERS") == 0; }

void GOMP_barrier(void) {
    if (team && barriers) pthread_barrier_wait(&team->barrier);
}

static __thread long alone_next, alone_end, alone_chunk;

static bool take(long *next, long end, long chunk, long *first, long *last) {
    if (*next >= end) return false;
    *first = *next;
    *last = *next = *next + chunk < end ? *next + chunk : end;
    return true;
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *last) {
    if (!team) return take(&alone_next, alone_end, alone_chunk, first, last);
    pthread_mutex_lock(&team->lock);
    const bool more = take(&team->next, team->end, team->chunk, first, last);
    pthread_mutex_unlock(&team->lock);
    return more;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *first, long *last) {
    if (step != 1) abort();
    if (!team) {
        alone_next = start, alone_end = end, alone_chunk = chunk;
        return take(&alone_next, end, chunk, first, last);
    }
    pthread_mutex_lock(&team->lock);
    if (team->inside++ == 0) team->next = start, team->end = end, team->chunk = chunk;
    pthread_mutex_unlock(&team->lock);
    return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end(void) {
    if (!team) return;
    if (pthread_barrier_wait(&team->barrier) == PTHREAD_BARRIER_SERIAL_THREAD) team->inside = 0;
    pthread_barrier_wait(&team->barrier);
}
