/*
 * blkback [OPTION...]: a block backend in user space, in whatever domain /dev/xen belongs to: it serves every
 * backend/vbd/DOMID/ID of that domain from the file that `params` names. For test_strangers_block.py.
 *
 *   --memory MIB      from memory of this size instead, which is gone with us
 *   --copy            move data with grant copies instead of mapping each request's pages
 *   --persistent      offer feature-persistent: what was mapped once stays mapped
 *   --max-requests K  end with SIGKILL when request K + 1 has been taken from a ring and not answered
 *
 * Commands (lines.h): `status` answers `ok REQUESTS DOMID/ID=STATE...`; `stop` closes all devices, answers `ok` and ends.
 * What happens to a device is told on stderr.
 *
 * The store decides: whenever any node that we watch changes, look at all devices and do what their states ask for. One
 * that a predecessor left Connected is first said to be Closed, so that its frontend lets go of it and begins anew.
 */
#include "lines.h"

#include <fcntl.h>
#include <getopt.h>
#include <sys/stat.h>

#include "blkdata.h"

#define MOST_DEVICES 8

static struct xs_handle *xs;
static struct device devices[MOST_DEVICES];
static long memory_mib;
static bool offer_persistent, stopping;

static void tell(const struct device *device, const char *what, const char *why)
{
    fprintf(stderr, "blkback: %s %s%s%s\n", strstr(device->node, "vbd/") + 4, what, *why ? ": " : "", why);
}

static void say_state(struct device *device, int state)
{
    device->state = state;
    node_switch(xs, device->node, state);
}

static void refuse(struct device *device, const char *why)
{
    tell(device, "refused", why);
    say_state(device, XenbusStateClosing);
    disconnect(device);
    say_state(device, XenbusStateClosed);
}

static void take_event(void)
{
    int port = xenevtchn_pending(xce);

    if (port < 0 || xenevtchn_unmask(xce, port))
        return;
    for (struct device *device = devices; device < devices + MOST_DEVICES; device++)
        if (device->ring.sring && device->port == (evtchn_port_t)port)
            device->more = true;
}

/* --- the handshake ------------------------------------------------------------------------------------------------- */

static bool open_storage(struct device *device)
{
    char *path = node_text(xs, device->node, "params"), *mode = node_text(xs, device->node, "mode");
    struct stat status;

    device->writable = mode && *mode == 'w';
    if (device->storage < 0 && memory_mib) {
        device->storage = memfd_create("blkback", MFD_CLOEXEC);
        if (ftruncate(device->storage, memory_mib << 20))
            perror("ftruncate");
    } else if (device->storage < 0 && path) {
        device->storage = open(path, (device->writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    }
    free(path);
    free(mode);
    if (device->storage < 0 || fstat(device->storage, &status))
        return false;
    device->sectors = status.st_size / SECTOR;
    return true;
}

static void offer(struct device *device)
{
    device->predecessor = false;
    if (!open_storage(device)) {
        refuse(device, strerror(errno));
        return;
    }
    node_write(xs, XBT_NULL, device->node, "feature-flush-cache", "1");
    node_write(xs, XBT_NULL, device->node, "feature-persistent", "%d", offer_persistent);
    node_write(xs, XBT_NULL, device->node, "hotplug-status", "connected");
    say_state(device, XenbusStateInitWait);
    tell(device, "offered", "");
}

static void connect_device(struct device *device)
{
    char *protocol = node_text(xs, device->front, "protocol");
    bool known = !protocol || !strcmp(protocol, "x86_64-abi");
    int bound;
    void *page;

    free(protocol);
    if (!known) {
        refuse(device, "protocol");
        return;
    }
    page = xengnttab_map_grant_ref(xgt, device->domid, node_number(xs, device->front, "ring-ref", 0),
                                   PROT_READ | PROT_WRITE);
    if (!page) {
        refuse(device, "ring-ref");
        return;
    }
    bound = xenevtchn_bind_interdomain(xce, device->domid, node_number(xs, device->front, "event-channel", 0));
    if (bound < 0) {
        xengnttab_unmap(xgt, page, 1);
        refuse(device, "event-channel");
        return;
    }
    BACK_RING_INIT(&device->ring, (blkif_sring_t *)page, PAGE);
    device->port = bound;
    device->persistent = offer_persistent && node_number(xs, device->front, "feature-persistent", 0) == 1;
    node_write(xs, XBT_NULL, device->node, "sectors", "%" PRIu64, device->sectors);
    node_write(xs, XBT_NULL, device->node, "sector-size", "%d", SECTOR);
    node_write(xs, XBT_NULL, device->node, "info", "%d", device->writable ? 0 : VDISK_READONLY);
    say_state(device, XenbusStateConnected);
    tell(device, "connected", device->persistent ? "persistent" : copying ? "copy" : "map");
}

static void close_device(struct device *device)
{
    if (device->state == XenbusStateClosed)
        return;
    disconnect(device);
    say_state(device, XenbusStateClosed);
    tell(device, "closed", "");
}

static void forget(struct device *device)
{
    char watched[NODE_BYTES + 8];

    disconnect(device);
    snprintf(watched, sizeof(watched), "%s/state", device->front);
    xs_unwatch(xs, watched, device->node);
    if (device->storage >= 0)
        close(device->storage);
    tell(device, "gone", "");
    device->node[0] = 0;
}

/* Do what the states ask for; nothing, if they are as we left them. Requests are served until the frontend is Closed. */
static void step(struct device *device)
{
    int peer = node_number(xs, device->front, "state", XenbusStateUnknown);
    int said = node_number(xs, device->node, "state", XenbusStateUnknown); /* the toolstack writes it, too */
    bool wanted = node_number(xs, device->node, "online", 1);
    bool peer_closed = peer == XenbusStateClosed || peer == XenbusStateUnknown;

    if (said == XenbusStateUnknown) {
        forget(device);
    } else if (stopping || said == XenbusStateClosing) {
        if (peer_closed || peer == XenbusStateInitialising)
            close_device(device);
        else if (said != XenbusStateClosing && said != XenbusStateClosed)
            say_state(device, XenbusStateClosing);
    } else if (wanted && peer == XenbusStateInitialising && device->state != XenbusStateInitWait) {
        disconnect(device); /* it may have begun anew without closing */
        offer(device);
    } else if (wanted && peer == XenbusStateClosed && device->predecessor) {
        offer(device);
    } else if (peer == XenbusStateInitialised && device->state == XenbusStateInitWait) {
        connect_device(device);
    } else if (peer == XenbusStateClosing && device->state != XenbusStateClosed) {
        say_state(device, XenbusStateClosing);
    } else if (peer_closed && device->state != XenbusStateInitWait) {
        close_device(device);
    }
}

/* --- devices ------------------------------------------------------------------------------------------------------- */

static void add_device(const char *node)
{
    struct device *device = devices;
    char watched[NODE_BYTES + 8], *front = node_text(xs, node, "frontend");

    for (struct device *each = devices; each < devices + MOST_DEVICES; each++)
        if (!strcmp(each->node, node)) {
            free(front);
            return;
        }
    while (device < devices + MOST_DEVICES && device->node[0])
        device++;
    if (front && device < devices + MOST_DEVICES && node_number(xs, node, "state", 0)) {
        memset(device, 0, sizeof(*device));
        snprintf(device->node, sizeof(device->node), "%s", node);
        snprintf(device->front, sizeof(device->front), "%s", front);
        device->domid = node_number(xs, node, "frontend-id", 0);
        device->storage = -1;
        device->state = node_number(xs, node, "state", 0);
        snprintf(watched, sizeof(watched), "%s/state", front);
        xs_watch(xs, watched, node);
        if (device->state != XenbusStateInitialising) {
            device->predecessor = true;
            say_state(device, XenbusStateClosed);
        }
    }
    free(front);
}

static void look_at_all(void)
{
    unsigned int domains, idents;
    char **domain = xs_directory(xs, XBT_NULL, "backend/vbd", &domains), **ident, path[NODE_BYTES];

    for (unsigned int i = 0; domain && i < domains; i++) {
        snprintf(path, sizeof(path), "backend/vbd/%s", domain[i]);
        ident = xs_directory(xs, XBT_NULL, path, &idents);
        for (unsigned int k = 0; ident && k < idents; k++) {
            snprintf(path, sizeof(path), "backend/vbd/%s/%s", domain[i], ident[k]);
            add_device(path);
        }
        free(ident);
    }
    free(domain);
    for (struct device *device = devices; device < devices + MOST_DEVICES; device++)
        if (device->node[0])
            step(device);
}

/* --- running ------------------------------------------------------------------------------------------------------- */

static void command_status(int words, char **word)
{
    char all[MOST_DEVICES * NODE_BYTES] = "";

    (void)words;
    (void)word;
    for (struct device *device = devices; device < devices + MOST_DEVICES; device++)
        if (device->node[0])
            sprintf(all + strlen(all), " %s=%d", strstr(device->node, "vbd/") + 4, device->state);
    reply("ok %ld%s", requests, all);
}

static void command_stop(int words, char **word)
{
    (void)words;
    (void)word;
    stopping = true;
}

static const struct command commands[] = {
    {"status", 0, command_status},
    {"stop", 0, command_stop},
    {NULL, 0, NULL},
};

static bool all_closed(void)
{
    for (struct device *device = devices; device < devices + MOST_DEVICES; device++)
        if (device->node[0] && device->state != XenbusStateClosed)
            return false;
    return true;
}

/* Wait for something, and do it. False at the end of stdin. */
static bool serve_once(void)
{
    struct pollfd fds[] = {{.fd = xs_fileno(xs), .events = POLLIN},
                           {.fd = xenevtchn_fd(xce), .events = POLLIN},
                           {.fd = 0, .events = stopping ? 0 : POLLIN}};
    bool more = false;

    for (struct device *device = devices; device < devices + MOST_DEVICES; device++)
        more = more || device->more;
    poll(fds, 3, more ? 0 : -1);
    if (fds[0].revents) {
        drop_watch_events(xs);
        look_at_all();
    }
    if (fds[1].revents)
        take_event();
    for (struct device *device = devices; device < devices + MOST_DEVICES; device++)
        if (device->more && !run_ring(device))
            refuse(device, "req_prod makes no sense");
    if (fds[2].revents & POLLIN) {
        char line[NODE_BYTES];

        if (!fgets(line, sizeof(line), stdin))
            return false;
        run_line(commands, line);
        if (stopping)
            look_at_all();
    }
    return true;
}

static bool read_options(int argc, char **argv)
{
    static const struct option options[] = {
        {"memory", required_argument, NULL, 'm'}, {"copy", no_argument, NULL, 'c'},
        {"persistent", no_argument, NULL, 'p'},   {"max-requests", required_argument, NULL, 'k'},
        {NULL, 0, NULL, 0},
    };
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'm')
            memory_mib = number(optarg);
        else if (option == 'k')
            max_requests = number(optarg);
        else if (option == 'c')
            copying = true;
        else if (option == 'p')
            offer_persistent = true;
        else
            return false;
    }
    return optind == argc;
}

int main(int argc, char **argv)
{
    bool open = true;

    if (!read_options(argc, argv)) {
        fprintf(stderr, "usage: blkback [--memory MIB] [--copy | --persistent] [--max-requests K]\n");
        return 1;
    }
    setvbuf(stdin, NULL, _IONBF, 0); /* poll() must see what we have not read */
    xs = xs_open(0);
    xce = xenevtchn_open(NULL, 0);
    xgt = xengnttab_open(NULL, 0);
    if (!xs || !xce || !xgt || !xs_watch(xs, "backend/vbd", "backend")) {
        fprintf(stderr, "%s: %s\n", !xs ? "xs_open" : !xce ? "xenevtchn_open" : !xgt ? "xengnttab_open" : "xs_watch",
                strerror(errno));
        return 1;
    }
    while (open && !(stopping && all_closed()))
        open = serve_once();
    if (stopping)
        reply("ok");
    return 0;
}
