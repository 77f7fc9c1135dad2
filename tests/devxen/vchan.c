/*
 * vchan.c: one end of a libxenvchan. It says "connected", does its work, and then what it saw as one line of JSON.
 *
 * vchan server|client DOMID PATH RING_BYTES WORK [N [SEED]]
 *   echo          sends back what comes, until the peer closes
 *   sink          counts and checks what comes, until the peer closes
 *   source N      sends N bytes
 *   ask N         sends N bytes in pieces of random sizes and checks that each comes back
 *   rounds N      N times one byte there and back
 *   wait          does nothing until the peer closes
 * Byte i of what `source` and `ask` send depends on i and SEED. A server waits for nobody before it connects; a client
 * tries until there is a server. RING_BYTES is what a server asks for in both directions; a client takes what it finds.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <libxenvchan.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PIECE 65536
#define PATIENCE_S 10

static struct libxenvchan *channel;
static uint64_t received, sent, wrong;
static uint32_t seed;
static uint8_t buffer[PIECE], answer[PIECE];
static double slowest_s;

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static uint8_t byte_at(uint64_t i)
{
    return (uint8_t)(i * 31 + (i >> 8) * 7 + (i >> 16) + seed);
}

static void fill(uint64_t position, size_t length)
{
    for (size_t i = 0; i < length; i++)
        buffer[i] = byte_at(position + i);
}

static void check(const uint8_t *bytes, uint64_t position, size_t length)
{
    for (size_t i = 0; i < length; i++)
        wrong += bytes[i] != byte_at(position + i);
}

/* All of it, or false when the peer is gone. */
static bool send_all(const void *bytes, size_t length)
{
    if (libxenvchan_write(channel, bytes, length) != (int)length)
        return false;
    sent += length;
    return true;
}

/* What is there, or 0 when the peer is gone. A signal, also SIGCONT, ends the library's wait. */
static int receive(uint8_t *bytes, size_t length)
{
    int got;

    do {
        errno = 0;
        got = libxenvchan_read(channel, bytes, length);
    } while (got < 0 && errno == EINTR);
    if (got <= 0)
        return 0;
    received += got;
    return got;
}

static bool receive_all(uint8_t *bytes, size_t length)
{
    for (size_t got = 0; got < length;) {
        int part = receive(bytes + got, length - got);

        if (!part)
            return false;
        got += part;
    }
    return true;
}

static bool echo(void)
{
    int got;

    while ((got = receive(buffer, PIECE)))
        if (!send_all(buffer, got))
            return false;
    return false;
}

static bool sink(void)
{
    int got;

    while ((got = receive(buffer, PIECE)))
        check(buffer, received - got, got);
    return false;
}

static bool source(uint64_t total)
{
    while (sent < total) {
        size_t length = total - sent < PIECE ? total - sent : PIECE;

        fill(sent, length);
        if (!send_all(buffer, length))
            return false;
    }
    /* Who finds the ring empty and then the peer gone looks no further: what is sent in between would be lost. */
    while (libxenvchan_buffer_space(channel) < 1 << channel->write.order)
        if (!libxenvchan_is_open(channel) || libxenvchan_wait(channel))
            return false;
    return true;
}

/* A piece is at most a ring, for the other end sends back while we still write. */
static bool ask(uint64_t total)
{
    unsigned int state = seed;
    size_t most = 1u << (channel->write.order < channel->read.order ? channel->write.order : channel->read.order);

    if (most > PIECE)
        most = PIECE;
    while (sent < total) {
        size_t length = 1 + rand_r(&state) % most;
        uint64_t position = sent;

        if (length > total - sent)
            length = total - sent;
        fill(position, length);
        if (!send_all(buffer, length) || !receive_all(answer, length))
            return false;
        check(answer, position, length);
    }
    return true;
}

static bool rounds(uint64_t total)
{
    for (uint64_t i = 0; i < total; i++) {
        double began = now();

        buffer[0] = byte_at(i);
        if (!send_all(buffer, 1) || !receive_all(answer, 1))
            return false;
        wrong += answer[0] != buffer[0];
        if (now() - began > slowest_s)
            slowest_s = now() - began;
    }
    return true;
}

/* As programs with a loop of their own do it: looks at the state after each event. */
static bool wait_for_end(void)
{
    while (libxenvchan_is_open(channel))
        if (libxenvchan_wait(channel))
            return false;
    return false;
}

static bool work(const char *name, uint64_t total)
{
    if (!strcmp(name, "echo"))
        return echo();
    if (!strcmp(name, "sink"))
        return sink();
    if (!strcmp(name, "source"))
        return source(total);
    if (!strcmp(name, "ask"))
        return ask(total);
    if (!strcmp(name, "rounds"))
        return rounds(total);
    if (!strcmp(name, "wait"))
        return wait_for_end();
    fprintf(stderr, "vchan: no work %s\n", name);
    exit(2);
}

static void open_channel(bool server, int domid, const char *path, size_t ring_bytes)
{
    double ends = now() + PATIENCE_S;

    if (server)
        channel = libxenvchan_server_init(NULL, domid, path, ring_bytes, ring_bytes);
    else
        while (!(channel = libxenvchan_client_init(NULL, domid, path)) && now() < ends)
            usleep(20000);
    if (!channel) {
        printf("{\"error\": \"%s\"}\n", strerrorname_np(errno));
        exit(1);
    }
    channel->blocking = 1;
    printf("connected\n");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    double began;
    bool finished;
    int left;

    if (argc < 6 || (strcmp(argv[1], "server") && strcmp(argv[1], "client"))) {
        fprintf(stderr, "usage: vchan server|client DOMID PATH RING_BYTES WORK [N [SEED]]\n");
        return 2;
    }
    seed = argc > 7 ? strtoul(argv[7], NULL, 0) : 0;
    open_channel(!strcmp(argv[1], "server"), atoi(argv[2]), argv[3], strtoul(argv[4], NULL, 0));
    began = now();
    finished = work(argv[5], argc > 6 ? strtoull(argv[6], NULL, 0) : 0);
    left = libxenvchan_is_open(channel);
    printf("{\"finished\": %s, \"peer\": %d, \"sent\": %llu, \"received\": %llu, \"wrong\": %llu, \"seconds\": %.6f, "
           "\"slowest\": %.6f}\n", finished ? "true" : "false", left, (unsigned long long)sent,
           (unsigned long long)received, (unsigned long long)wrong, now() - began, slowest_s);
    fflush(stdout);
    libxenvchan_close(channel);
    return 0;
}
