/*
 * grants.c: libxengnttab and libxengntshr behind a command line. Commands and replies are those of lines.h.
 *
 * A mapping, a share and plain memory (`alloc`) all get a number, and are read and written alike. Page i filled with
 * seed s holds words that depend on both, so that no page can pass for another.
 */
#include "lines.h"

#include <sys/ioctl.h>
#include <sys/mman.h>
#include <xenevtchn.h>
#include <xengnttab.h>

#define PAGE 4096u
#define MOST_AREAS 256
#define MOST_REFS 1024
#define MOST_SEGMENTS 256

struct area {
    uint8_t *address; /* NULL: free */
    uint32_t pages;
};

static struct area areas[MOST_AREAS];
static xengnttab_handle *tab;
static xengntshr_handle *shr;
static xenevtchn_handle *events;
static uint32_t refs[MOST_REFS], domids[MOST_REFS];

static int protection(const char *word)
{
    return strcmp(word, "rw") ? PROT_READ : PROT_READ | PROT_WRITE;
}

static struct area *area(const char *word)
{
    uint32_t i = number(word);

    if (i < MOST_AREAS && areas[i].address)
        return &areas[i];
    fprintf(stderr, "no area %s\n", word);
    exit(1); /* the test is wrong */
}

/* The number of a new area, or -1 if the call failed. */
static int keep(void *address, uint32_t pages)
{
    if (!address)
        return -1;
    for (int i = 0; i < MOST_AREAS; i++) {
        if (areas[i].address)
            continue;
        areas[i] = (struct area){address, pages};
        return i;
    }
    errno = ENOBUFS;
    return -1;
}

static uint32_t take_refs(int words, char **word)
{
    uint32_t count = 0;
    for (; count < MOST_REFS && (int)count < words; count++)
        refs[count] = number(word[count]);
    return count;
}

/* --- libxengnttab --- */

static void map(int words, char **word)
{
    uint32_t count = take_refs(words - 2, word + 2);

    reply_number(keep(xengnttab_map_domain_grant_refs(tab, count, number(word[1]), refs, protection(word[0])), count));
}

static void map_mixed(int words, char **word)
{
    uint32_t count = 0;

    for (; count < MOST_REFS && (int)count < words - 1; count++)
        if (sscanf(word[count + 1], "%u:%u", &domids[count], &refs[count]) != 2)
            exit(1);
    reply_number(keep(xengnttab_map_grant_refs(tab, count, domids, refs, protection(word[0])), count));
}

static void map_notify(int words, char **word)
{
    void *address = xengnttab_map_grant_ref_notify(tab, number(word[1]), number(word[2]), protection(word[0]),
                                                   number(word[3]), number(word[4]));

    (void)words;
    reply_number(keep(address, 1));
}

/* With a number of pages it is those, else all. */
static void unmap(int words, char **word)
{
    struct area *mapped = area(word[0]);
    int result = xengnttab_unmap(tab, mapped->address, words > 1 ? number(word[1]) : mapped->pages);

    if (!result)
        mapped->address = NULL;
    reply_done(result);
}

/* "DOMID:REF:OFFSET" is a grant, "AREA+OFFSET" memory of ours. True for a grant. */
static bool copy_end(const char *word, union xengnttab_copy_ptr *end)
{
    unsigned int domid, ref, offset, i;

    if (sscanf(word, "%u:%u:%u", &domid, &ref, &offset) == 3) {
        end->foreign.domid = domid;
        end->foreign.ref = ref;
        end->foreign.offset = offset;
        return true;
    }
    if (sscanf(word, "%u+%u", &i, &offset) != 2 || i >= MOST_AREAS)
        exit(1);
    end->virt = areas[i].address + offset;
    return false;
}

static void copy(int words, char **word)
{
    static xengnttab_grant_copy_segment_t segments[MOST_SEGMENTS];
    uint32_t count = words / 3 < MOST_SEGMENTS ? words / 3 : MOST_SEGMENTS;

    memset(segments, 0, sizeof(segments));
    for (uint32_t i = 0; i < count; i++) {
        xengnttab_grant_copy_segment_t *segment = &segments[i];

        segment->flags = copy_end(word[3 * i], &segment->source) ? GNTCOPY_source_gref : 0;
        segment->flags |= copy_end(word[3 * i + 1], &segment->dest) ? GNTCOPY_dest_gref : 0;
        segment->len = number(word[3 * i + 2]);
        segment->status = 99; /* no status of Xen's */
    }
    if (xengnttab_grant_copy(tab, count, segments)) {
        reply_error();
        return;
    }
    printf("status");
    for (uint32_t i = 0; i < count; i++)
        printf(" %d", segments[i].status);
    reply("");
}

/* An ioctl of any number with any pointer, on gntdev or gntalloc. */
static void raw_ioctl(int words, char **word)
{
    int fd = strcmp(word[0], "shr") ? xengnttab_fd(tab) : xengntshr_fd(shr);

    (void)words;
    reply_number(ioctl(fd, strtoul(word[1], NULL, 0), (void *)strtoul(word[2], NULL, 0)));
}

/* mmap(2) of a device at an offset that nobody gave us; what is there is read. */
static void raw_mmap(int words, char **word)
{
    int fd = strcmp(word[0], "shr") ? xengnttab_fd(tab) : xengntshr_fd(shr);
    uint32_t pages = number(word[2]);
    uint8_t *address = mmap(NULL, pages * PAGE, PROT_READ, MAP_SHARED, fd, strtol(word[1], NULL, 0));

    (void)words;
    reply_number(keep(address == MAP_FAILED ? NULL : address, pages));
}

/* --- libxengntshr --- */

static void reply_shared(void *address, uint32_t pages)
{
    int i = keep(address, pages);

    if (i < 0) {
        reply_error();
        return;
    }
    printf("%d", i);
    for (uint32_t page = 0; page < pages; page++)
        printf(" %u", refs[page]);
    reply("");
}

static void share(int words, char **word)
{
    uint32_t pages = number(word[2]);

    (void)words;
    reply_shared(xengntshr_share_pages(shr, number(word[1]), pages, refs, !strcmp(word[0], "rw")), pages);
}

static void share_notify(int words, char **word)
{
    (void)words;
    reply_shared(xengntshr_share_page_notify(shr, number(word[1]), refs, !strcmp(word[0], "rw"), number(word[2]),
                                             number(word[3])), 1);
}

static void unshare(int words, char **word)
{
    struct area *shared = area(word[0]);
    int result = xengntshr_unshare(shr, shared->address, shared->pages);

    (void)words;
    if (!result)
        shared->address = NULL;
    reply_done(result);
}

/* --- memory --- */

static void alloc(int words, char **word)
{
    uint32_t pages = number(word[0]);
    void *address = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    (void)words;
    reply_number(keep(address == MAP_FAILED ? NULL : address, pages));
}

static void protect(int words, char **word)
{
    struct area *changed = area(word[0]);

    (void)words;
    reply_done(mprotect(changed->address, changed->pages * PAGE, protection(word[1])));
}

static void read_bytes(int words, char **word)
{
    const volatile uint8_t *from = area(word[0])->address + number(word[1]);
    static char hex[2 * PAGE + 1];
    uint32_t length = number(word[2]);

    (void)words;
    for (uint32_t i = 0; i < length && i < PAGE; i++)
        sprintf(hex + 2 * i, "%02x", from[i]);
    reply("%s", hex);
}

static void write_bytes(int words, char **word)
{
    volatile uint8_t *to = area(word[0])->address + number(word[1]);
    unsigned int byte;

    (void)words;
    for (const char *hex = word[2]; sscanf(hex, "%2x", &byte) == 1; hex += 2)
        *to++ = byte;
    reply("ok");
}

static uint32_t pattern(uint32_t seed, uint32_t page, uint32_t i)
{
    return (seed * 2654435761u) ^ (page << 16) ^ (i * 40503u);
}

static void fill(int words, char **word)
{
    struct area *filled = area(word[0]);
    volatile uint32_t *to = (volatile uint32_t *)filled->address;

    (void)words;
    for (uint32_t page = 0; page < filled->pages; page++)
        for (uint32_t i = 0; i < PAGE / 4; i++)
            *to++ = pattern(number(word[1]), page, i);
    reply("ok");
}

static void check(int words, char **word)
{
    struct area *checked = area(word[0]);
    const volatile uint32_t *from = (const volatile uint32_t *)checked->address;
    uint32_t seed = number(word[1]);

    (void)words;
    for (uint32_t page = 0; page < checked->pages; page++)
        for (uint32_t i = 0; i < PAGE / 4; i++) {
            uint32_t found = *from++;

            if (found == pattern(seed, page, i))
                continue;
            reply("page %u word %u is %08x, not %08x", page, i, found, pattern(seed, page, i));
            return;
        }
    reply("ok");
}

/* --- events, for notifications --- */

static void bind_unbound(int words, char **word)
{
    (void)words;
    reply_number(xenevtchn_bind_unbound_port(events, number(word[0])));
}

static void bind_interdomain(int words, char **word)
{
    (void)words;
    reply_number(xenevtchn_bind_interdomain(events, number(word[0]), number(word[1])));
}

static void close_events(int words, char **word)
{
    (void)words, (void)word;
    reply_done(xenevtchn_close(events));
    events = NULL;
}

/* --- the end --- */

static void close_tab(int words, char **word)
{
    (void)words, (void)word;
    reply_done(xengnttab_close(tab));
    tab = NULL;
}

static void close_shr(int words, char **word)
{
    (void)words, (void)word;
    reply_done(xengntshr_close(shr));
    shr = NULL;
}

static void leave(int words, char **word)
{
    _exit(words ? (int)number(word[0]) : 0);
}

static bool churn_once(unsigned int *seed, uint32_t domid, uint32_t count)
{
    uint32_t first = rand_r(seed) % count, pages = 1 + rand_r(seed) % (count - first), given[8];
    volatile uint8_t *mapped = xengnttab_map_domain_grant_refs(tab, pages, domid, refs + first, PROT_READ | PROT_WRITE);
    uint32_t shared_pages = 1 + rand_r(seed) % 8;
    volatile uint8_t *shared = xengntshr_share_pages(shr, domid, shared_pages, given, 1);
    bool failed = !mapped || (!shared && errno != ENOSPC); /* the limit is the domain's, not ours */
    int port = xenevtchn_bind_unbound_port(events, domid);

    if (mapped) {
        mapped[rand_r(seed) % (pages * PAGE)] = 1;
        failed |= xengnttab_unmap(tab, (void *)mapped, pages) != 0;
    }
    if (shared) {
        shared[rand_r(seed) % (shared_pages * PAGE)] = 1;
        failed |= xengntshr_unshare(shr, (void *)shared, shared_pages) != 0;
    }
    return !failed && port >= 0 && !xenevtchn_unbind(events, port);
}

/* Maps, shares, binds and undoes it for ever: somebody will kill us. */
static void churn(int words, char **word)
{
    unsigned int seed = number(word[0]);
    uint32_t count = take_refs(words - 2, word + 2);

    while (churn_once(&seed, number(word[1]), count))
        ;
    reply_error();
}

static const struct command COMMANDS[] = {
    {"map", 3, map},                           /* ro|rw DOMID REF... -> area */
    {"map-mixed", 2, map_mixed},               /* ro|rw DOMID:REF... -> area */
    {"map-notify", 5, map_notify},             /* ro|rw DOMID REF OFFSET PORT, -1 for none -> area */
    {"unmap", 1, unmap},                       /* AREA [PAGES] */
    {"copy", 0, copy},                         /* (SOURCE DESTINATION LENGTH)... -> status of each */
    {"share", 3, share},                       /* ro|rw DOMID PAGES -> area, references */
    {"share-notify", 4, share_notify},         /* ro|rw DOMID OFFSET PORT -> area, reference */
    {"unshare", 1, unshare},                   /* AREA */
    {"ioctl", 3, raw_ioctl},                   /* tab|shr NUMBER POINTER -> result */
    {"mmap", 3, raw_mmap},                     /* tab|shr OFFSET PAGES -> area */
    {"alloc", 1, alloc},                       /* PAGES -> area */
    {"protect", 2, protect},                   /* AREA ro|rw */
    {"read", 3, read_bytes},                   /* AREA OFFSET LENGTH -> hex */
    {"write", 3, write_bytes},                 /* AREA OFFSET HEX */
    {"fill", 2, fill},                         /* AREA SEED */
    {"check", 2, check},                       /* AREA SEED -> ok, or what differs */
    {"bind-unbound", 1, bind_unbound},         /* DOMID -> port */
    {"bind-interdomain", 2, bind_interdomain}, /* DOMID PORT -> port */
    {"close-events", 0, close_events},
    {"close-tab", 0, close_tab},
    {"close-shr", 0, close_shr},
    {"churn", 3, churn},                       /* SEED DOMID REF... */
    {"leave", 0, leave},                       /* [STATUS], with everything open */
    {NULL, 0, NULL},
};

int main(void)
{
    tab = xengnttab_open(NULL, 0);
    shr = xengntshr_open(NULL, 0);
    events = xenevtchn_open(NULL, 0);
    if (!tab || !shr || !events) {
        perror("open");
        return 1;
    }
    return run_lines(COMMANDS);
}
