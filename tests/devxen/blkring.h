/*
 * blkring.h: the data path of blkfront.c: requests on the ring, responses from it, and what is in the sectors.
 *
 * Each of the ring's RING requests has SEGMENTS pages of its own. A command is cut into requests; as many as the ring
 * holds are under way at once, and their answers come in any order.
 */
#ifndef BLKRING_H
#define BLKRING_H

#include <inttypes.h>
#include <stddef.h>
#include <xenevtchn.h>
#include <xen/io/blkif.h>
#include <xen/io/xenbus.h>

#include "nodes.h"

#define PAGE 4096
#define SECTOR 512
#define SECTORS_PER_PAGE (PAGE / SECTOR)
#define WORDS (SECTOR / 8)
#define RING __CONST_RING_SIZE(blkif, PAGE)
#define SEGMENTS BLKIF_MAX_SEGMENTS_PER_REQUEST
#define PATIENCE_S 15
#define MOST_SECTORS (1 << 18) /* of one command */

struct request {
    bool busy;
    int op;
    uint64_t sector;
    unsigned int count;
    struct blkif_request_segment segments[SEGMENTS];
};

static struct xs_handle *xs;
static xenevtchn_handle *xce;
static char back[NODE_BYTES]; /* the backend's directory */
static bool attached, random_shape;
static blkif_front_ring_t ring;
static evtchn_port_t port;
static char *pages; /* RING * SEGMENTS of them, granted as refs */
static uint32_t refs[RING * SEGMENTS];
static struct request requests[RING];
static uint64_t sectors, seed, random_state = 1;
static unsigned int sector_size, in_flight, most_in_flight, sent;
static char *buffer; /* what a command reads */
static uint64_t buffer_sector;
static char failure[512];

__attribute__((format(printf, 1, 2))) static bool fail(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(failure, sizeof(failure), format, arguments);
    va_end(arguments);
    return false;
}

static unsigned int any(unsigned int below)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (random_state >> 33) % below;
}

static int backend_state(void)
{
    return node_number(xs, back, "state", XenbusStateUnknown);
}

static void fill(uint64_t *words, uint64_t sector)
{
    for (unsigned int i = 0; i < WORDS; i++)
        words[i] = (seed << 40) + sector * WORDS + i;
}

/* Each sector that the request's segments name, in order: the pattern goes out, or what came is kept. */
static void move_data(unsigned int id)
{
    const struct request *request = &requests[id];
    uint64_t at = request->sector;

    for (unsigned int k = 0; k < request->count; k++) {
        char *page = pages + (id * SEGMENTS + k) * (size_t)PAGE;

        for (unsigned int i = request->segments[k].first_sect; i <= request->segments[k].last_sect; i++, at++) {
            if (request->op == BLKIF_OP_WRITE)
                fill((uint64_t *)(page + i * SECTOR), at);
            else
                memcpy(buffer + (at - buffer_sector) * SECTOR, page + i * SECTOR, SECTOR);
        }
    }
}

/* Name the pages of request `id`, for at most `left` sectors. How many it covers. */
static unsigned int cut(unsigned int id, uint64_t left)
{
    unsigned int grain = sector_size / SECTOR, blocks = SECTORS_PER_PAGE / grain, total = 0, k = 0;
    unsigned int most = random_shape ? 1 + any(SEGMENTS) : SEGMENTS;

    for (; k < most && total < left; k++) {
        unsigned int first = random_shape ? any(blocks) : 0, length = random_shape ? 1 + any(blocks - first) : blocks;

        if (length * grain > left - total)
            length = (left - total) / grain;
        requests[id].segments[k] = (struct blkif_request_segment){
            .gref = refs[id * SEGMENTS + k], .first_sect = first * grain, .last_sect = (first + length) * grain - 1};
        total += length * grain;
    }
    requests[id].count = k;
    return total;
}

/* Put a read or write of at most `left` sectors on the ring. How many it takes; 0 if the ring is full. */
static unsigned int put(int op, uint64_t sector, uint64_t left)
{
    unsigned int id = 0, total;
    blkif_request_t *slot;

    if (RING_FULL(&ring))
        return 0;
    while (requests[id].busy)
        id++;
    total = cut(id, left);
    requests[id].busy = true;
    requests[id].op = op;
    requests[id].sector = sector;
    if (op == BLKIF_OP_WRITE)
        move_data(id);
    slot = RING_GET_REQUEST(&ring, ring.req_prod_pvt++);
    slot->operation = op;
    slot->nr_segments = requests[id].count;
    slot->handle = 0;
    slot->id = id;
    slot->sector_number = sector;
    memcpy(slot->seg, requests[id].segments, sizeof(slot->seg));
    sent++;
    if (++in_flight > most_in_flight)
        most_in_flight = in_flight;
    return total;
}

static void push(void)
{
    int notify;

    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, notify);
    if (notify && xenevtchn_notify(xce, port))
        perror("xenevtchn_notify");
}

/* Sleep until the backend sends an event, or is no longer connected. */
static bool wait_event(void)
{
    struct pollfd fds[] = {{.fd = xenevtchn_fd(xce), .events = POLLIN}, {.fd = xs_fileno(xs), .events = POLLIN}};
    int ready = poll(fds, 2, PATIENCE_S * 1000), told;

    if (ready <= 0)
        return fail("no event in %d s with %u requests out", PATIENCE_S, in_flight);
    if (fds[1].revents) {
        drop_watch_events(xs);
        if (backend_state() != XenbusStateConnected)
            return fail("the backend went to state %d with %u requests out", backend_state(), in_flight);
    }
    if (fds[0].revents) {
        told = xenevtchn_pending(xce);
        if (told < 0 || xenevtchn_unmask(xce, told))
            return fail("xenevtchn_pending: %s", strerror(errno));
    }
    return true;
}

/* One response: the request it answers is free again. */
static bool take(const blkif_response_t *response)
{
    struct request *request = response->id < RING ? &requests[response->id] : NULL;

    if (!request || !request->busy || request->op != response->operation)
        return fail("a response to id %" PRIu64 ", operation %u, which is not out", response->id, response->operation);
    request->busy = false;
    in_flight--;
    if (response->status)
        return fail("status %d for operation %d at sector %" PRIu64, response->status, request->op, request->sector);
    if (request->op == BLKIF_OP_READ)
        move_data(response->id);
    return true;
}

/* Wait for at least one response and take all that are there; after one that failed go on until none is out. */
static bool collect(void)
{
    unsigned int taken = 0;
    bool good = true;
    int more;

    while (!taken || (!good && in_flight)) {
        RING_IDX produced = ring.sring->rsp_prod;

        xen_rmb();
        if (RING_RESPONSE_PROD_OVERFLOW(&ring, produced) || produced - ring.rsp_cons > in_flight)
            return fail("rsp_prod is %u, %u requests are out", produced, in_flight);
        while (ring.rsp_cons != produced) {
            blkif_response_t response;

            RING_COPY_RESPONSE(&ring, ring.rsp_cons, &response);
            ring.rsp_cons++;
            taken++;
            good = take(&response) && good;
        }
        RING_FINAL_CHECK_FOR_RESPONSES(&ring, more);
        if (!more && (!taken || (!good && in_flight)) && !wait_event())
            return false;
    }
    return good;
}

static bool transfer(int op, uint64_t sector, uint64_t count)
{
    uint64_t end = sector + count;

    if (!attached || count > MOST_SECTORS || count % (sector_size / SECTOR))
        return fail("not connected, or too many sectors, or part of a block");
    buffer = realloc(buffer, MOST_SECTORS * (size_t)SECTOR);
    buffer_sector = sector;
    sent = most_in_flight = 0;
    while (sector < end || in_flight) {
        unsigned int taken;

        while (sector < end && (taken = put(op, sector, end - sector)))
            sector += taken;
        push();
        if (!collect())
            return false;
    }
    return true;
}

/* A request without data, or a broken one; the status of its answer. */
static int single(blkif_request_t *request)
{
    blkif_response_t response;
    int more;

    request->id = 7;
    *RING_GET_REQUEST(&ring, ring.req_prod_pvt++) = *request;
    in_flight++;
    push();
    do {
        RING_FINAL_CHECK_FOR_RESPONSES(&ring, more);
    } while (!more && wait_event());
    in_flight--;
    if (!more)
        return 1;
    RING_COPY_RESPONSE(&ring, ring.rsp_cons, &response);
    ring.rsp_cons++;
    return response.id == 7 && response.operation == request->operation ? response.status : 1;
}

static uint32_t crc32(const char *data, size_t length)
{
    static uint32_t table[256];
    uint32_t crc = ~0u;

    for (unsigned int i = 0; !table[255] && i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++)
            table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320 : 0);
    }
    while (length--)
        crc = crc >> 8 ^ table[(crc ^ *data++) & 0xff];
    return ~crc;
}

static bool verify(uint64_t sector, uint64_t count)
{
    uint64_t words[WORDS];

    for (uint64_t i = 0; i < count; i++) {
        fill(words, sector + i);
        if (memcmp(buffer + i * SECTOR, words, SECTOR))
            return fail("sector %" PRIu64 " holds something else", sector + i);
    }
    return true;
}

#endif
