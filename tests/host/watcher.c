/*
 * watcher PREFIX THREADS ROUNDS: libxenstore as programs with threads use it, for test_store_c.py and
 * test_xenbus_device.py.
 *
 * Each thread has a connection of its own and watches PREFIX/<its number> and PREFIX/all; the main thread writes 1 to
 * ROUNDS to each of these nodes, which are not there at first, and leaves them in the end. A thread reads the node that an
 * event names, and is done when it saw ROUNDS in both. Then it drops one watch, and closes with the other one set, while
 * libxenstore's own thread waits in read(2).
 * Prints one line per thread and returns 0 if all saw all; 1 if somebody saw what he should not, or got an error; if
 * something hangs, SIGALRM ends it.
 */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xenstore.h>

#define MOST_THREADS 64
#define PATH_BYTES 256
#define PATIENCE_S 50

struct watcher {
    pthread_t thread;
    int number;
    unsigned long events, backwards;
    int seen_own, seen_all;
    char failure[PATH_BYTES * 2];
};

static const char *prefix;
static int rounds;
static pthread_barrier_t all_watch;

static bool fail(struct watcher *w, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(w->failure, sizeof(w->failure), format, arguments);
    va_end(arguments);
    return false;
}

static int read_number(struct xs_handle *xs, const char *path)
{
    unsigned int length;
    char *value = xs_read(xs, XBT_NULL, path, &length);
    int number = value ? atoi(value) : -1;

    free(value);
    return number;
}

/* One event: is it ours, and what is in the node now? */
static bool take_event(struct watcher *w, struct xs_handle *xs, const char *own, const char *all)
{
    static const char *const tokens[] = {"all", "own"};
    unsigned int count;
    char **event = xs_read_watch(xs, &count);
    int *seen, number;
    bool mine;

    if (!event)
        return fail(w, "xs_read_watch: %s", strerror(errno));
    mine = !strcmp(event[XS_WATCH_PATH], own);
    if (strcmp(event[XS_WATCH_TOKEN], tokens[mine]) || (!mine && strcmp(event[XS_WATCH_PATH], all))) {
        fail(w, "event of %s with token %s", event[XS_WATCH_PATH], event[XS_WATCH_TOKEN]);
        free(event);
        return false;
    }
    w->events++;
    number = read_number(xs, event[XS_WATCH_PATH]);
    free(event);
    if (number < 0)
        return errno == ENOENT ? true : fail(w, "xs_read: %s", strerror(errno)); /* not written yet */
    seen = mine ? &w->seen_own : &w->seen_all;
    if (number < *seen)
        w->backwards++;
    *seen = number;
    return true;
}

static void *watch(void *argument)
{
    struct watcher *w = argument;
    struct xs_handle *xs = xs_open(0);
    char own[PATH_BYTES], all[PATH_BYTES];

    snprintf(own, sizeof(own), "%s/%d", prefix, w->number);
    snprintf(all, sizeof(all), "%s/all", prefix);
    if (!xs)
        fail(w, "xs_open: %s", strerror(errno));
    else if (!xs_watch(xs, own, "own") || !xs_watch(xs, all, "all"))
        fail(w, "xs_watch: %s", strerror(errno));
    pthread_barrier_wait(&all_watch);
    while (!w->failure[0] && (w->seen_own < rounds || w->seen_all < rounds))
        take_event(w, xs, own, all);
    if (!w->failure[0] && !xs_unwatch(xs, own, "own"))
        fail(w, "xs_unwatch: %s", strerror(errno));
    if (xs)
        xs_close(xs);
    return NULL;
}

static bool write_number(struct xs_handle *xs, const char *name, int number)
{
    char path[PATH_BYTES], value[16];

    snprintf(path, sizeof(path), "%s/%s", prefix, name);
    snprintf(value, sizeof(value), "%d", number);
    return xs_write(xs, XBT_NULL, path, value, strlen(value));
}

static bool write_all(struct xs_handle *xs, int threads)
{
    char name[16];
    int round, i;

    for (round = 1; round <= rounds; round++) {
        for (i = 0; i < threads; i++) {
            snprintf(name, sizeof(name), "%d", i);
            if (!write_number(xs, name, round))
                return false;
        }
        if (!write_number(xs, "all", round))
            return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    static struct watcher watchers[MOST_THREADS];
    struct xs_handle *xs;
    int threads = argc == 4 ? atoi(argv[2]) : 0, i, status = 0;

    if (threads < 1 || threads > MOST_THREADS || strlen(argv[1]) > PATH_BYTES / 2) {
        fprintf(stderr, "usage: watcher PREFIX THREADS ROUNDS (at most %d threads)\n", MOST_THREADS);
        return 1;
    }
    alarm(PATIENCE_S);
    prefix = argv[1];
    rounds = atoi(argv[3]);
    pthread_barrier_init(&all_watch, NULL, threads + 1);
    xs = xs_open(0);
    if (!xs || (!xs_rm(xs, XBT_NULL, prefix) && errno != ENOENT)) {
        perror("the writer");
        return 1;
    }
    for (i = 0; i < threads; i++) {
        watchers[i].number = i;
        if (pthread_create(&watchers[i].thread, NULL, watch, &watchers[i])) {
            perror("pthread_create");
            return 1;
        }
    }
    pthread_barrier_wait(&all_watch);
    if (!write_all(xs, threads)) {
        perror("the writer");
        return 1; /* the threads would wait for ever */
    }
    for (i = 0; i < threads; i++) {
        struct watcher *w = &watchers[i];

        pthread_join(w->thread, NULL);
        printf("thread %d: own %d, all %d, %lu events, %lu backwards%s%s\n", i, w->seen_own, w->seen_all, w->events,
               w->backwards, w->failure[0] ? ": " : "", w->failure);
        if (w->failure[0] || w->backwards)
            status = 1;
    }
    xs_close(xs);
    return status;
}
