/* xenstore.c: how fast a xenstore server answers libxenstore.
 *
 *     xenstore-bench MODE NODES CONNECTIONS MILLISECONDS
 *
 * Built and run by bench/xenstore.py; $XENSTORED_PATH says which server. Prints "ready" once everything is prepared, then
 * works for that long, or until SIGTERM, and prints one line of JSON: what it did and how long each took. Every connection
 * has a thread of its own; the first WARM_NS are not counted.
 *
 * The tree has about NODES nodes: /bench/gGGGG holds up to GROUP directories dDDDDDD, each of them CHILDREN leaves. `fill`
 * makes it. Threads keep to directories of their own, so that their transactions do not conflict.
 *
 * Invariants: an answer other than the one expected ends the program with a message and code 1, and so does an answer or
 * an event that does not come: a rate is never that of errors.
 * Left out: anything that goes around libxenstore. What it costs (a write(2) for each part of a request, a thread that
 * reads once a connection has a watch) is in the figures, the same for every server.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>
#include <xenstore.h>

#define CHILDREN 20u
#define GROUP 50u
#define MANY 10000u          /* children of the directory that flood-list lists */
#define GONE_DIRECTORIES 20u /* flood-remove: the top, and 20 directories with 49 leaves each: 1001 nodes */
#define GONE_CHILDREN 49u
#define WINDOW 32u /* watch-stream: events under way; each of another node, for a server may drop equal ones */
#define VALUE 16u
#define PATH 64u
#define SECOND_NS 1000000000ull
#define WARM_NS 50000000l
#define ANSWER_S 10
#define MOST_CONNECTIONS 256u

enum phase { WARMING, MEASURING, STOPPING };

struct worker {
    unsigned index;
    struct xs_handle *xs, *other; /* who watches is `other`: the same one, but for pairs */
    char path[PATH], watched[PATH]; /* `path` is a leaf, another one for each step */
    uint64_t random;
    unsigned long turns, conflicts;
    uint64_t began_ns; /* the step; one that does something first sets it anew */
    uint64_t first_ns, last_ns;
    uint32_t *samples; /* ns */
    size_t count, room;
    pthread_t thread, writer;
    sem_t slots; /* this and below: watch-stream */
    uint64_t stamps[WINDOW], received;
    atomic_ulong total; /* 0: not known yet */
};

struct mode {
    const char *name;
    void (*step)(struct worker *), (*setup)(struct worker *), (*finish)(struct worker *);
    bool pairs;
};

static atomic_int phase;
static unsigned directories, workers = 1;
static pthread_barrier_t start_line;
static const struct mode *mode;

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *format, ...) {
    int error = errno;
    va_list words;
    va_start(words, format);
    flockfile(stderr); /* one message, though others may fail, too */
    fputs("xenstore-bench: ", stderr);
    vfprintf(stderr, format, words);
    fprintf(stderr, ": %s\n", error ? strerror(error) : "not what was expected");
    _exit(1);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND_NS + (uint64_t)time.tv_nsec;
}

static struct xs_handle *connected(void) {
    struct xs_handle *xs = xs_open(0);
    if (!xs)
        die("cannot connect");
    return xs;
}

static void put(struct xs_handle *xs, xs_transaction_t transaction, const char *path, unsigned number) {
    char value[VALUE + 1];
    snprintf(value, sizeof(value), "value-%010u", number);
    errno = 0;
    if (!xs_write(xs, transaction, path, value, VALUE))
        die("write %s", path);
}

static void get(struct xs_handle *xs, xs_transaction_t transaction, const char *path) {
    unsigned length = 0;
    char *value;
    errno = 0;
    value = xs_read(xs, transaction, path, &length);
    if (!value || length != VALUE || memcmp(value, "value-", 6))
        die("read %s", path);
    free(value);
}

static void list(struct xs_handle *xs, const char *path, unsigned expected) {
    unsigned count = 0;
    char **names;
    errno = 0;
    names = xs_directory(xs, XBT_NULL, path, &count);
    if (!names || count != expected)
        die("directory %s, of %u", path, count);
    free(names);
}

/* The next event; -> the number behind the last '/' of its path. */
static unsigned event_number(struct xs_handle *xs) {
    unsigned count, number;
    char **event, *name;
    errno = 0;
    event = xs_read_watch(xs, &count);
    if (!event || strcmp(event[XS_WATCH_TOKEN], "token"))
        die("event");
    name = strrchr(event[XS_WATCH_PATH], '/');
    if (!name || sscanf(name, "/%u", &number) != 1)
        die("event of %s", event[XS_WATCH_PATH]);
    free(event);
    errno = 0;
    return number;
}

static void leaf_path(char *path, unsigned directory, unsigned leaf) {
    snprintf(path, PATH, "/bench/g%04u/d%06u/n%02u", directory / GROUP, directory, leaf);
}

static unsigned draw(struct worker *w, unsigned below) {
    w->random = w->random * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((w->random >> 33) % below);
}

static void some_leaf(struct worker *w, char *path) {
    unsigned directory = draw(w, directories / workers) * workers + w->index;
    leaf_path(path, directory, draw(w, CHILDREN));
}

static void step_read(struct worker *w) { get(w->xs, XBT_NULL, w->path); }
static void step_write(struct worker *w) { put(w->xs, XBT_NULL, w->path, (unsigned)w->turns++); }

static void step_directory(struct worker *w) {
    *strrchr(w->path, '/') = '\0';
    list(w->xs, w->path, CHILDREN);
}

/* One that conflicts is done again, and all of it counts as one. */
static void step_transaction(struct worker *w) {
    char other[PATH];
    for (some_leaf(w, other);; w->conflicts++) {
        xs_transaction_t transaction = xs_transaction_start(w->xs);
        if (transaction == XBT_NULL)
            die("transaction start");
        get(w->xs, transaction, w->path);
        put(w->xs, transaction, other, (unsigned)w->turns++);
        if (xs_transaction_end(w->xs, transaction, false))
            return;
        if (errno != EAGAIN)
            die("transaction end");
    }
}

static void setup_watch(struct worker *w) {
    snprintf(w->watched, PATH, "/bench-watch/%u", w->index);
    put(w->xs, XBT_NULL, w->watched, 0);
    if (!xs_watch(w->other, w->watched, "token"))
        die("watch %s", w->watched);
    event_number(w->other); /* the one that every watch begins with */
}

/* From before the write until its event is there. */
static void step_watch(struct worker *w) {
    put(w->xs, XBT_NULL, w->watched, (unsigned)w->turns++);
    if (event_number(w->other) != w->index)
        die("another's event");
}

/* Writes as fast as the window lets it; the worker itself receives. The last event is one that knows how many there were. */
static void *write_stream(void *argument) {
    struct worker *w = argument;
    char path[2 * PATH];
    for (uint64_t sent = 0, total = 0; !total; sent++) {
        while (sem_wait(&w->slots))
            ;
        if (atomic_load(&phase) == STOPPING)
            atomic_store(&w->total, total = sent + 1);
        snprintf(path, sizeof(path), "%s/%u", w->watched, (unsigned)(sent % WINDOW));
        w->stamps[sent % WINDOW] = now();
        put(w->xs, XBT_NULL, path, (unsigned)sent);
    }
    return NULL;
}

static void setup_stream(struct worker *w) {
    setup_watch(w);
    sem_init(&w->slots, 0, WINDOW);
    if ((errno = pthread_create(&w->writer, NULL, write_stream, w)))
        die("thread");
}

static void step_stream(struct worker *w) {
    unsigned number = event_number(w->other);
    if (number != w->received % WINDOW) /* one is missing, there twice or out of order */
        die("event %lu is of node %u", (unsigned long)w->received, number);
    w->received++;
    w->began_ns = w->stamps[number];
    sem_post(&w->slots);
}

static void finish_stream(struct worker *w) {
    while (w->received != atomic_load(&w->total))
        step_stream(w);
    pthread_join(w->writer, NULL);
}

static void step_flood_rw(struct worker *w) {
    put(w->xs, XBT_NULL, w->path, (unsigned)w->turns++);
    some_leaf(w, w->path);
    get(w->xs, XBT_NULL, w->path);
}

static void setup_flood_list(struct worker *w) {
    char path[PATH];
    for (unsigned number = 0; w->index == 0 && number < MANY; number++) {
        snprintf(path, sizeof(path), "/bench-many/c%05u", number);
        put(w->xs, XBT_NULL, path, number);
    }
}

static void step_flood_list(struct worker *w) { list(w->xs, "/bench-many", MANY); }

/* What is timed is the removal; first, all of it is made. */
static void step_flood_remove(struct worker *w) {
    char path[PATH];
    for (unsigned number = 0; number < GONE_DIRECTORIES * GONE_CHILDREN; number++) {
        snprintf(path, sizeof(path), "/bench-gone/%u/d%u/n%u", w->index, number / GONE_CHILDREN, number);
        put(w->xs, XBT_NULL, path, number);
    }
    snprintf(path, sizeof(path), "/bench-gone/%u", w->index);
    w->began_ns = now();
    if (!xs_rm(w->xs, XBT_NULL, path))
        die("rm %s", path);
}

static const struct mode modes[] = {
    {"read", step_read, NULL, NULL, false},
    {"write", step_write, NULL, NULL, false},
    {"directory", step_directory, NULL, NULL, false},
    {"transaction", step_transaction, NULL, NULL, false},
    {"watch-own", step_watch, setup_watch, NULL, false},
    {"watch-other", step_watch, setup_watch, NULL, true},
    {"watch-stream", step_stream, setup_stream, finish_stream, true},
    {"flood-rw", step_flood_rw, NULL, NULL, false},
    {"flood-list", step_flood_list, setup_flood_list, NULL, false},
    {"flood-remove", step_flood_remove, NULL, NULL, false},
};

static void record(struct worker *w) {
    uint64_t end = now(), took = end - w->began_ns;
    if (w->count == w->room) {
        w->room = w->room ? 2 * w->room : 1 << 16;
        w->samples = realloc(w->samples, w->room * sizeof(*w->samples));
        if (!w->samples)
            die("memory");
    }
    w->samples[w->count++] = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
    w->last_ns = end;
}

static void *work(void *argument) {
    struct worker *w = argument;
    pthread_barrier_wait(&start_line);
    for (int when; (when = atomic_load(&phase)) != STOPPING;) {
        some_leaf(w, w->path);
        w->began_ns = now();
        if (when == MEASURING && !w->first_ns)
            w->first_ns = w->began_ns;
        mode->step(w);
        if (when == MEASURING)
            record(w);
    }
    if (mode->finish)
        mode->finish(w);
    return NULL;
}

static int ascending(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

static int report(struct worker *all, unsigned connections) {
    unsigned long conflicts = 0;
    uint32_t *ns = NULL;
    size_t count = 0;
    double rate = 0;
    for (struct worker *w = all; w < all + workers; w++) {
        ns = realloc(ns, (count + w->count + 1) * sizeof(*ns));
        if (!ns)
            die("memory");
        memcpy(ns + count, w->samples, w->count * sizeof(*ns));
        count += w->count;
        conflicts += w->conflicts;
        rate += w->count ? (double)w->count * SECOND_NS / (double)(w->last_ns - w->first_ns) : 0;
    }
    errno = 0;
    if (!count)
        die("nothing done in that time");
    qsort(ns, count, sizeof(*ns), ascending);
    printf("{\"connections\": %u, \"count\": %zu, \"rate\": %.3f, \"conflicts\": %lu, ", connections, count,
           rate, conflicts);
    printf("\"median_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f}\n", ns[(count - 1) / 2] / 1e3,
           ns[(count * 99 + 99) / 100 - 1] / 1e3, ns[count - 1] / 1e3);
    return 0;
}

static int fill(struct worker *w) {
    w->xs = connected();
    w->first_ns = now();
    for (unsigned number = 0; number < directories * CHILDREN; number++) {
        leaf_path(w->path, number / CHILDREN, number % CHILDREN);
        w->began_ns = now();
        put(w->xs, XBT_NULL, w->path, number);
        record(w);
    }
    return report(w, 1);
}

/* Measure for that long unless a signal comes, and wait for everybody, but not for ever. */
static void conduct(struct worker *all, long milliseconds) {
    struct timespec warm = {0, WARM_NS}, length = {milliseconds / 1000, milliseconds % 1000 * 1000000}, deadline;
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL); /* in the threads, too */
    pthread_barrier_init(&start_line, NULL, workers + 1);
    for (struct worker *w = all; w < all + workers; w++) {
        w->index = (unsigned)(w - all);
        w->random = w->index + 1;
        w->xs = connected();
        w->other = mode->pairs ? connected() : w->xs;
        if (mode->setup)
            mode->setup(w);
        if ((errno = pthread_create(&w->thread, NULL, work, w)))
            die("thread");
    }
    dprintf(STDOUT_FILENO, "ready\n");
    pthread_barrier_wait(&start_line);
    nanosleep(&warm, NULL);
    atomic_store(&phase, MEASURING);
    sigtimedwait(&signals, NULL, &length);
    atomic_store(&phase, STOPPING);
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += ANSWER_S;
    for (struct worker *w = all; w < all + workers; w++)
        if ((errno = pthread_timedjoin_np(w->thread, NULL, &deadline)))
            die("no answer within %u s", ANSWER_S);
}

int main(int count, char **words) {
    struct worker *all = calloc(MOST_CONNECTIONS, sizeof(*all));
    unsigned connections;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* whoever started this is the one it works for */
    if (count != 5 || !all)
        return fprintf(stderr, "usage: xenstore-bench MODE NODES CONNECTIONS MILLISECONDS\n"), 2;
    directories = (unsigned)atoi(words[2]) / (CHILDREN + 1);
    connections = (unsigned)atoi(words[3]);
    for (const struct mode *known = modes; known < modes + sizeof(modes) / sizeof(*modes); known++)
        if (!strcmp(words[1], known->name))
            mode = known;
    if (!connections || connections > MOST_CONNECTIONS || directories < connections)
        return fprintf(stderr, "xenstore-bench: no connections, or more than %u or than directories\n", MOST_CONNECTIONS), 2;
    if (!strcmp(words[1], "fill"))
        return fill(all);
    if (!mode)
        return fprintf(stderr, "xenstore-bench: no mode %s\n", words[1]), 2;
    workers = mode->pairs ? (connections + 1) / 2 : connections;
    conduct(all, atol(words[4]));
    return report(all, mode->pairs ? 2 * workers : workers);
}
