/* nodes.h: small values in the store, and the barriers that io/ring.h asks for; for blkfront.c and blkback.c. */
#ifndef NODES_H
#define NODES_H

#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xenstore.h>

#define NODE_BYTES 256

#define mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define wmb() __atomic_thread_fence(__ATOMIC_RELEASE)

/* A copy of the value of DIRECTORY/NAME, to be freed; NULL if there is none or we may not look. */
static inline char *node_text(struct xs_handle *xs, const char *directory, const char *name)
{
    char path[2 * NODE_BYTES];
    unsigned int length;

    snprintf(path, sizeof(path), "%s/%s", directory, name);
    return xs_read(xs, XBT_NULL, path, &length);
}

static inline long long node_number(struct xs_handle *xs, const char *directory, const char *name, long long missing)
{
    char *text = node_text(xs, directory, name), *end;
    long long number = text ? strtoll(text, &end, 10) : missing;

    if (text && (end == text || *end))
        number = missing;
    free(text);
    return number;
}

__attribute__((format(printf, 5, 6))) static inline bool node_write(
    struct xs_handle *xs, xs_transaction_t transaction, const char *directory, const char *name, const char *format, ...)
{
    char path[2 * NODE_BYTES], value[NODE_BYTES];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(value, sizeof(value), format, arguments);
    va_end(arguments);
    snprintf(path, sizeof(path), "%s/%s", directory, name);
    return xs_write(xs, transaction, path, value, strlen(value));
}

/* Say our state, unless the toolstack has taken the directory away. */
static inline bool node_switch(struct xs_handle *xs, const char *directory, int state)
{
    return node_number(xs, directory, "state", 0) && node_write(xs, XBT_NULL, directory, "state", "%d", state);
}

/* Forget the events that came: who calls looks at everything anyway. */
static inline void drop_watch_events(struct xs_handle *xs)
{
    char **event;

    while ((event = xs_check_watch(xs)))
        free(event);
}

static inline double now_s(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

#endif
