/* devxen.c: what two programs in two domains have from Xen's libraries, beside what Unix gives them.
 *
 *     devxen-bench WORK PAGES MILLISECONDS FIRST  LEADER'S-DEV-XEN DOMID  PEER'S-DEV-XEN DOMID
 *
 * Built and run by bench/devxen.py. Two processes, each with its domain's dev/xen bound over /dev/xen in a mount namespace
 * of its own, do one work in two ways, for that long each: "xenfs" through libxenevtchn, libxengnttab or libxenvchan, and
 * "unix" through the socketpair that connects the same two, or for a mapping with a memfd. FIRST (0 or 1) says which comes
 * first. The leader times each operation and prints one line of JSON; the first WARM_NS are not counted.
 *
 * Invariants: what was copied or mapped is compared with what the other process wrote, and every status is looked at: a
 * figure is never that of errors.
 * Left out: mapping for writing, which takes the same ioctls, and notifications of an unmap.
 */
#define _GNU_SOURCE
#include "devxen.h"

#include <xenevtchn.h>
#include <xengnttab.h>

#define PAGE 4096u
#define SEGMENTS 64u /* of one grant copy */
#define COPY (SEGMENTS * PAGE)
#define MOST_PAGES 256u
#define MESSAGE (1u << 20) /* what is written to a vchan at once */
#define VCHAN (256u << 10) /* each of its two rings; the buffer of a socket is 208 KiB by default */
#define FIRST_GREF 8u      /* those below are the toolstack's */
#define MOST_GREFS 16384u  /* that are asked about */
#define VCHAN_PATH "data/devxen-bench"

static unsigned pages;
static uint32_t refs[MOST_PAGES];
static uint8_t *buffer, *granted, *local; /* messages; what the peer shares; where and whence we copy */
static bool marked;                       /* each granted page is full of its mark */
static int memory_fd = -1;                /* what a mapping is compared with */
static xenevtchn_handle *events;
static evtchn_port_t port;
static xengnttab_handle *gnttab;
static xengnttab_grant_copy_segment_t segments[SEGMENTS];

static uint8_t mark(unsigned page) { return (uint8_t)(page % 251 + 1); }

/* There and back: one byte, or an event. */

static void lead_ping(bool last) {
    uint8_t byte = last;
    put(&byte, 1);
    get(&byte, 1);
}

static bool follow_ping(void) {
    uint8_t byte;
    get(&byte, 1);
    put(&byte, 1);
    return byte;
}

static void take_event(void) {
    xenevtchn_port_or_error_t found = xenevtchn_pending(events);
    if (found < 0 || (evtchn_port_t)found != port || xenevtchn_unmask(events, port))
        die("event of port %u: %d", port, found);
}

static void notify(void) {
    if (xenevtchn_notify(events, port))
        die("notify port %u", port);
}

/* The numbers say which event it was: a channel begins with one that nobody sent, and two may become one. */
static void lead_event(bool last) {
    unsigned turn = atomic_load(&shared->ping) + 1;
    atomic_store(&shared->last, last);
    atomic_store(&shared->ping, turn);
    notify();
    do
        take_event();
    while (atomic_load(&shared->pong) != turn);
}

static bool follow_event(void) {
    unsigned turn;
    bool last;
    do
        take_event();
    while ((turn = atomic_load(&shared->ping)) == atomic_load(&shared->pong));
    last = atomic_load(&shared->last);
    atomic_store(&shared->pong, turn);
    notify();
    return last;
}

static void open_events(void) {
    if (!(events = xenevtchn_open(NULL, 0)))
        die("xenevtchn_open");
}

static void bind_peer(void) {
    xenevtchn_port_or_error_t found;
    open_events();
    if ((found = xenevtchn_bind_unbound_port(events, other_domid)) < 0)
        die("bind a port for domain %u", other_domid);
    port = (evtchn_port_t)found;
    put(&port, sizeof(port));
}

static void bind_lead(void) {
    xenevtchn_port_or_error_t found;
    open_events();
    get(&port, sizeof(port));
    if ((found = xenevtchn_bind_interdomain(events, other_domid, port)) < 0)
        die("bind to port %u of domain %u", port, other_domid);
    port = (evtchn_port_t)found;
}

/* One message after another. The first byte says that it is the last, and then there is an answer. */

static void lead_send(bool last) {
    buffer[0] = last;
    put(buffer, work->message);
    moved += work->message;
    if (last)
        get(buffer, 1);
}

static bool follow_receive(void) {
    get(buffer, work->message);
    if (buffer[0])
        put(buffer, 1);
    return buffer[0];
}

static void lead_receive(bool last) {
    atomic_store(&shared->last, last);
    do {
        get(buffer, work->message);
        moved += work->message;
    } while (last && !buffer[0]);
}

static bool follow_send(void) {
    buffer[0] = atomic_load(&shared->last);
    put(buffer, work->message);
    return buffer[0];
}

/* Grants: of the other program's pages, or of a kernel's that runs in the server. */

static void open_gnttab(void) {
    if (!(gnttab = xengnttab_open(NULL, 0)))
        die("xengnttab_open");
}

static void share(void) {
    xengntshr_handle *gntshr = xengntshr_open(NULL, 0);
    if (!gntshr || !(granted = xengntshr_share_pages(gntshr, other_domid, (int)pages, refs, 1)))
        die("share %u pages with domain %u", pages, other_domid);
    for (unsigned page = 0; page < pages; page++)
        memset(granted + page * PAGE, mark(page), PAGE);
    put(refs, sizeof(refs));
}

static void learn_refs(void) {
    open_gnttab();
    get(refs, sizeof(refs));
    marked = true;
}

static void copy_segments(void) {
    for (unsigned each = 0; each < SEGMENTS; each++)
        segments[each].status = 1; /* none of Xen's */
    if (xengnttab_grant_copy(gnttab, SEGMENTS, segments))
        die("grant copy");
}

/* What the other domain grants to ours: whatever a byte can be copied from. */
static void find_grants(void) {
    unsigned found = 0;
    open_gnttab();
    for (unsigned ref = FIRST_GREF; ref < MOST_GREFS && found < pages; ref += SEGMENTS) {
        for (unsigned each = 0; each < SEGMENTS; each++) {
            xengnttab_grant_copy_segment_t *s = &segments[each];
            memset(s, 0, sizeof(*s));
            s->source.foreign.ref = ref + each;
            s->source.foreign.domid = (uint16_t)other_domid;
            s->dest.virt = local;
            s->len = 1;
            s->flags = GNTCOPY_source_gref;
        }
        copy_segments();
        for (unsigned each = 0; each < SEGMENTS && found < pages; each++)
            if (segments[each].status == GNTST_okay)
                refs[found++] = ref + each;
    }
    if (found < pages)
        errno = 0, die("%u pages that domain %u grants to us, of %u", found, other_domid, pages);
}

/* The program reads a byte of each page: a mapping that nobody looks at is none. */
static void look(const volatile uint8_t *mapped, bool with_marks) {
    for (unsigned page = 0; page < pages; page++) {
        uint8_t found = mapped[page * PAGE];
        if (with_marks && found != mark(page))
            errno = 0, die("page %u begins with %u", page, found);
    }
}

static void lead_map(bool last) {
    void *mapped = xengnttab_map_domain_grant_refs(gnttab, pages, other_domid, refs, PROT_READ);
    (void)last; /* nobody waits for it */
    if (!mapped)
        die("map %u pages of domain %u", pages, other_domid);
    look(mapped, marked);
    if (xengnttab_unmap(gnttab, mapped, pages))
        die("unmap %u pages", pages);
}

static void lead_memfd(bool last) {
    void *mapped = mmap(NULL, pages * PAGE, PROT_READ, MAP_SHARED, memory_fd, 0);
    (void)last;
    if (mapped == MAP_FAILED)
        die("mmap");
    look(mapped, true);
    munmap(mapped, pages * PAGE);
}

static void make_memfd(void) {
    if ((memory_fd = memfd_create("devxen-bench", MFD_CLOEXEC)) < 0)
        die("memfd");
    for (unsigned page = 0; page < pages; page++) {
        memset(buffer, mark(page), PAGE);
        if (pwrite(memory_fd, buffer, PAGE, page * PAGE) != PAGE)
            die("memfd");
    }
}

static void prepare_kernel(void) { make_memfd(), find_grants(); }
static void prepare_program(void) { make_memfd(), learn_refs(); }

static void lead_copy(bool last) {
    (void)last;
    copy_segments();
    for (unsigned each = 0; each < SEGMENTS; each++)
        if (segments[each].status != GNTST_okay)
            errno = 0, die("grant copy, segment %u: status %d", each, segments[each].status);
    moved += COPY;
}

static void prepare_copy(bool from_grants) {
    learn_refs();
    for (unsigned each = 0; each < SEGMENTS; each++) {
        xengnttab_grant_copy_segment_t *s = &segments[each];
        union xengnttab_copy_ptr *theirs = from_grants ? &s->source : &s->dest;
        (from_grants ? &s->dest : &s->source)->virt = local + each * PAGE;
        theirs->foreign.ref = refs[each];
        theirs->foreign.domid = (uint16_t)other_domid;
        s->len = PAGE;
        s->flags = from_grants ? GNTCOPY_source_gref : GNTCOPY_dest_gref;
    }
    for (unsigned each = 0; each < SEGMENTS && !from_grants; each++)
        memset(local + each * PAGE, mark(each) + 1, PAGE);
}

static void prepare_from(void) { prepare_copy(true); }
static void prepare_to(void) { prepare_copy(false); }

static void compare(const uint8_t *found, unsigned more) {
    for (size_t at = 0; at < COPY; at++)
        if (found[at] != (uint8_t)(mark((unsigned)(at / PAGE)) + more))
            errno = 0, die("byte %zu of what was copied is %u", at, found[at]);
}

static void check_from(void) { compare(local, 0); }
static void check_to(void) { compare(granted, 1); }

static void offer_vchan(void) {
    if (!(vchan = libxenvchan_server_init(NULL, (int)other_domid, VCHAN_PATH, VCHAN, VCHAN)))
        die("offer a vchan to domain %u", other_domid);
    vchan->blocking = 1;
    put("", 1);
}

static void join_vchan(void) {
    char path[64], byte;
    snprintf(path, sizeof(path), "/local/domain/%u/" VCHAN_PATH, other_domid);
    get(&byte, 1);
    if (!(vchan = libxenvchan_client_init(NULL, (int)other_domid, path)))
        die("join the vchan %s", path);
    vchan->blocking = 1;
}

static void close_vchan(void) { libxenvchan_close(vchan); }

static const struct work works[] = {
    {"event", {{lead_event, follow_event, false}, {lead_ping, follow_ping, false}}, bind_peer, bind_lead, NULL, NULL, 0},
    {"map-kernel", {{lead_map, NULL, false}, {lead_memfd, NULL, false}}, NULL, prepare_kernel, NULL, NULL, 0},
    {"map-program", {{lead_map, NULL, false}, {lead_memfd, NULL, false}}, share, prepare_program, NULL, NULL, 0},
    {"copy-from", {{lead_copy, NULL, false}, {lead_receive, follow_send, false}}, share, prepare_from, NULL, check_from,
     COPY},
    {"copy-to", {{lead_copy, NULL, false}, {lead_send, follow_receive, false}}, share, prepare_to, check_to, NULL, COPY},
    {"vchan-bulk",
     {{lead_send, follow_receive, true}, {lead_send, follow_receive, false}},
     offer_vchan,
     join_vchan,
     close_vchan,
     close_vchan,
     MESSAGE},
    {"vchan-round",
     {{lead_ping, follow_ping, true}, {lead_ping, follow_ping, false}},
     offer_vchan,
     join_vchan,
     close_vchan,
     close_vchan,
     0},
};

int main(int words, char **word) {
    for (const struct work *known = works; words == 9 && known < works + sizeof(works) / sizeof(*works); known++)
        if (!strcmp(word[1], known->name))
            work = known;
    pages = words == 9 ? (unsigned)atoi(word[2]) : 0;
    if (!work || !pages || pages > MOST_PAGES || (work->message == COPY && pages != SEGMENTS))
        return fprintf(stderr, "usage: devxen-bench WORK PAGES MILLISECONDS FIRST DEV-XEN DOMID DEV-XEN DOMID\n"), 2;
    buffer = memory(MESSAGE, MAP_PRIVATE);
    local = memory(COPY, MAP_PRIVATE);
    return run((unsigned)atoi(word[4]), (uint64_t)atol(word[3]) * 1000000, word + 5);
}
