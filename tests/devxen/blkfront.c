/*
 * blkfront ID: a block frontend in user space, in whatever domain /dev/xen belongs to: libxenstore for device/vbd/ID,
 * libxengntshr for the pages, libxenevtchn, the ring of Xen's own headers. For test_strangers_block.py.
 *
 * Commands (lines.h) and what they answer if not `error TEXT`:
 *   connect [WAY]             from whatever a predecessor has left to Connected; `ok SECTORS SECTOR-SIZE INFO PERSISTENT`.
 *                             WAY `abrupt`: without closing first what was left; `persistent`: the backend may keep the
 *                             grants mapped; `badring`, `badport`: publish nonsense
 *   write SECTOR COUNT SEED   a pattern that depends on seed and sector; `ok REQUESTS MOST-IN-FLIGHT`
 *   read SECTOR COUNT         `ok CRC32 REQUESTS MOST-IN-FLIGHT`
 *   verify SECTOR COUNT SEED  read and compare; `ok REQUESTS MOST-IN-FLIGHT`
 *   shape full|random         of requests: 11 whole pages, or any number of segments with any sectors of their pages
 *   flush                     `ok STATUS`
 *   flood SEED                `ok`, then writes and verifies all of the disk until somebody ends us
 *   garbage KIND              a request that is wrong in this way (see break_rules()): `ok STATUS`, or the backend's state
 *   events COUNT              notifications for nothing
 *   state                     `ok OURS BACKENDS`
 *   close                     Closing, Closed, everything given back
 *   die COUNT                 put that many writes on the ring, tell the backend, and end with SIGKILL
 */
#include "lines.h"

#include <signal.h>
#include <xengnttab.h>

#include "blkring.h"

static xengntshr_handle *xgs;
static char front[NODE_BYTES];
static int backend_id;
static bool watching;
static uint32_t ring_ref;

/* --- the handshake ------------------------------------------------------------------------------------------------- */

/* Wait until the backend's state is one of this set of bits. */
static bool wait_backend(unsigned int wanted)
{
    double deadline = now_s() + PATIENCE_S;
    struct pollfd change = {.fd = xs_fileno(xs), .events = POLLIN};
    int state;

    while (drop_watch_events(xs), state = backend_state(), !(wanted >> state & 1)) {
        int left_ms = (deadline - now_s()) * 1000;

        if (left_ms <= 0)
            return fail("the backend is in state %d, not in one of 0x%x", state, wanted);
        poll(&change, 1, left_ms);
    }
    return true;
}

#define IN(state) (1u << XenbusState##state)

static bool find_backend(void)
{
    char *path = node_text(xs, front, "backend"), watched[NODE_BYTES + 8];

    if (!path)
        return fail("%s/backend: %s", front, strerror(errno));
    snprintf(back, sizeof(back), "%s", path);
    free(path);
    backend_id = node_number(xs, front, "backend-id", -1);
    if (watching)
        return true;
    snprintf(watched, sizeof(watched), "%s/state", back);
    watching = xs_watch(xs, watched, "backend");
    return watching || fail("xs_watch: %s", strerror(errno));
}

/* What a predecessor has left is closed first, as Linux does when it was started with kexec. */
static bool start_over(bool abrupt)
{
    int ours = node_number(xs, front, "state", XenbusStateUnknown);

    if (ours != XenbusStateInitialising && !abrupt) {
        node_switch(xs, front, XenbusStateClosing);
        if (!wait_backend(IN(Closing) | IN(Closed)))
            return false;
        node_switch(xs, front, XenbusStateClosed);
        if (!wait_backend(IN(Closed) | IN(InitWait)))
            return false;
    }
    if (!node_switch(xs, front, XenbusStateInitialising))
        return fail("%s/state: %s", front, strerror(errno));
    return wait_backend(IN(InitWait));
}

static void release(void)
{
    if (!attached)
        return;
    attached = false;
    xenevtchn_unbind(xce, port);
    xengntshr_unshare(xgs, pages, RING * SEGMENTS);
    xengntshr_unshare(xgs, ring.sring, 1);
}

static bool acquire(void)
{
    blkif_sring_t *shared = xengntshr_share_pages(xgs, backend_id, 1, &ring_ref, 1);
    int bound;

    if (!shared)
        return fail("the ring's page: %s", strerror(errno));
    pages = xengntshr_share_pages(xgs, backend_id, RING * SEGMENTS, refs, 1);
    if (!pages) {
        fail("the data pages: %s", strerror(errno));
        xengntshr_unshare(xgs, shared, 1);
        return false;
    }
    XEN_FRONT_RING_INIT(&ring, shared, PAGE);
    memset(requests, 0, sizeof(requests));
    in_flight = 0;
    bound = xenevtchn_bind_unbound_port(xce, backend_id);
    port = bound;
    attached = true; /* an unbind of no port only fails */
    return bound >= 0 || fail("bind_unbound_port: %s", strerror(errno));
}

static bool publish(const char *words)
{
    bool written;

    do {
        xs_transaction_t transaction = xs_transaction_start(xs);

        if (transaction == XBT_NULL)
            return fail("xs_transaction_start: %s", strerror(errno));
        written = node_write(xs, transaction, front, "ring-ref", "%u", strstr(words, "badring") ? 999999 : ring_ref) &&
                  node_write(xs, transaction, front, "event-channel", "%u", strstr(words, "badport") ? 999 : port) &&
                  node_write(xs, transaction, front, "feature-persistent", "%d", !!strstr(words, "persistent")) &&
                  node_write(xs, transaction, front, "protocol", "x86_64-abi");
        if (!xs_transaction_end(xs, transaction, !written)) {
            if (errno == EAGAIN)
                continue;
            written = false;
        }
        break;
    } while (true);
    return written || fail("the frontend's nodes: %s", strerror(errno));
}

static bool connect_device(const char *words)
{
    release();
    if (!find_backend() || !start_over(strstr(words, "abrupt")) || !acquire() || !publish(words))
        return false;
    if (!node_switch(xs, front, XenbusStateInitialised) || !wait_backend(IN(Connected) | IN(Closing) | IN(Closed)))
        return fail("no answer to our nodes: state %d", backend_state());
    if (backend_state() != XenbusStateConnected)
        return fail("refused: state %d", backend_state());
    sectors = node_number(xs, back, "sectors", 0);
    sector_size = node_number(xs, back, "sector-size", SECTOR);
    node_switch(xs, front, XenbusStateConnected);
    reply("ok %" PRIu64 " %u %lld %lld", sectors, sector_size, node_number(xs, back, "info", 0),
          node_number(xs, back, "feature-persistent", 0));
    return true;
}

static bool close_device(void)
{
    node_switch(xs, front, XenbusStateClosing);
    if (!wait_backend(IN(Closing) | IN(Closed) | IN(Unknown)))
        return false;
    node_switch(xs, front, XenbusStateClosed);
    if (!wait_backend(IN(Closed) | IN(Unknown)))
        return false;
    release();
    reply("ok");
    return true;
}

/* --- a frontend that breaks the rules ------------------------------------------------------------------------------ */

/* Indices that make no sense: the state to which that brings the backend. */
static bool bad_header(bool all)
{
    if (all)
        memset((void *)ring.sring, 0xff, offsetof(blkif_sring_t, ring));
    ring.sring->req_prod = ring.req_prod_pvt + 1000;
    xenevtchn_notify(xce, port);
    if (!wait_backend(IN(Closing) | IN(Closed)))
        return false;
    reply("ok %d", backend_state());
    return true;
}

static bool break_rules(const char *kind)
{
    blkif_request_t request = {.operation = BLKIF_OP_READ, .nr_segments = 1};

    request.seg[0] = (struct blkif_request_segment){.gref = refs[0], .first_sect = 0, .last_sect = 7};
    if (!strcmp(kind, "producer") || !strcmp(kind, "header"))
        return bad_header(!strcmp(kind, "header"));
    if (!strcmp(kind, "gref"))
        request.seg[0].gref = 4000000;
    else if (!strcmp(kind, "op"))
        request.operation = 77;
    else if (!strcmp(kind, "segments"))
        request.nr_segments = 200;
    else if (!strcmp(kind, "none"))
        request.nr_segments = 0;
    else if (!strcmp(kind, "sector"))
        request.sector_number = UINT64_MAX - 2;
    else if (!strcmp(kind, "end"))
        request.sector_number = sectors - 1;
    else if (!strcmp(kind, "order"))
        request.seg[0].first_sect = 5, request.seg[0].last_sect = 4;
    else if (!strcmp(kind, "range"))
        request.seg[0].last_sect = 200;
    else
        return fail("garbage of what kind?");
    reply("ok %d", single(&request));
    return true;
}

/* --- commands ------------------------------------------------------------------------------------------------------ */

/* What a command says if it went wrong; if not, it has replied. */
static void finish(bool good)
{
    if (!good)
        reply("error %s", failure);
}

static void finish_transfer(bool good)
{
    if (good)
        reply("ok %u %u", sent, most_in_flight);
    finish(good);
}

static void command_connect(int words, char **word)
{
    finish(connect_device(words ? word[0] : ""));
}

static void command_write(int words, char **word)
{
    (void)words;
    seed = number(word[2]);
    finish_transfer(transfer(BLKIF_OP_WRITE, number(word[0]), number(word[1])));
}

static void command_read(int words, char **word)
{
    bool good = transfer(BLKIF_OP_READ, number(word[0]), number(word[1]));

    (void)words;
    if (good)
        reply("ok %08x %u %u", crc32(buffer, number(word[1]) * (size_t)SECTOR), sent, most_in_flight);
    finish(good);
}

static void command_verify(int words, char **word)
{
    (void)words;
    seed = number(word[2]);
    finish_transfer(transfer(BLKIF_OP_READ, number(word[0]), number(word[1])) && verify(number(word[0]), number(word[1])));
}

static void command_shape(int words, char **word)
{
    (void)words;
    random_shape = !strcmp(word[0], "random");
    reply("ok");
}

static void command_flush(int words, char **word)
{
    blkif_request_t request = {.operation = BLKIF_OP_FLUSH_DISKCACHE};

    (void)words;
    (void)word;
    reply("ok %d", attached ? single(&request) : 1);
}

static void command_flood(int words, char **word)
{
    uint64_t count = sectors < MOST_SECTORS ? sectors : MOST_SECTORS;

    (void)words;
    reply("ok");
    seed = number(word[0]);
    while (transfer(BLKIF_OP_WRITE, 0, count) && transfer(BLKIF_OP_READ, 0, count) && verify(0, count))
        ;
    finish(false);
}

static void command_garbage(int words, char **word)
{
    (void)words;
    finish(attached ? break_rules(word[0]) : fail("not connected"));
}

static void command_events(int words, char **word)
{
    (void)words;
    for (uint32_t i = 0; i < number(word[0]); i++)
        xenevtchn_notify(xce, port);
    reply("ok");
}

static void command_state(int words, char **word)
{
    (void)words;
    (void)word;
    reply("ok %lld %d", node_number(xs, front, "state", 0), back[0] ? backend_state() : 0);
}

static void command_close(int words, char **word)
{
    (void)words;
    (void)word;
    finish(close_device());
}

static void command_die(int words, char **word)
{
    (void)words;
    seed = 99;
    for (uint32_t i = 0; attached && i < number(word[0]); i++)
        put(BLKIF_OP_WRITE, i * SEGMENTS * SECTORS_PER_PAGE, SEGMENTS * SECTORS_PER_PAGE);
    if (attached)
        push();
    kill(getpid(), SIGKILL);
}

int main(int argc, char **argv)
{
    static const struct command commands[] = {
        {"connect", 0, command_connect}, {"write", 3, command_write},     {"read", 2, command_read},
        {"verify", 3, command_verify},   {"shape", 1, command_shape},     {"flush", 0, command_flush},
        {"flood", 1, command_flood},     {"garbage", 1, command_garbage}, {"events", 1, command_events},
        {"state", 0, command_state},     {"close", 0, command_close},     {"die", 1, command_die},
        {NULL, 0, NULL},
    };

    if (argc != 2) {
        fprintf(stderr, "usage: blkfront ID\n");
        return 1;
    }
    snprintf(front, sizeof(front), "device/vbd/%s", argv[1]);
    xs = xs_open(0);
    xce = xenevtchn_open(NULL, 0);
    xgs = xengntshr_open(NULL, 0);
    if (!xs || !xce || !xgs) {
        fprintf(stderr, "%s: %s\n", !xs ? "xs_open" : !xce ? "xenevtchn_open" : "xengntshr_open", strerror(errno));
        return 1;
    }
    return run_lines(commands);
}
