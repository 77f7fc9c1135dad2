/* devxen.h: two processes in two domains that do the same work in two ways, and how long each operation took.
 *
 * Included by devxen.c, which has the works; this is what they have in common: messages between the two, the namespace
 * each lives in, the timing, the answer. The leader is the process that was started, the peer its child.
 *
 * Invariants: whatever fails in one of the two ends both, with a message and code 1, and without an answer. Nothing of this
 * is seen outside their mount namespaces but by the server that is measured.
 */
#include <errno.h>
#include <fcntl.h>
#include <libxenvchan.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS 1000000000ull
#define WARM_NS 50000000ull

/* A way to do one operation. `follow` does the peer's half, NULL if it has none, and says whether it was the last one. That
 * one is not counted: by it the peer learns that there are no more. */
struct way {
    void (*lead)(bool last);
    bool (*follow)(void);
    bool vchan;
};

struct work {
    const char *name;
    struct way ways[2];                           /* xenfs, unix */
    void (*prepare_peer)(void), (*prepare)(void); /* run at the same time */
    void (*check_peer)(void), (*check)(void);     /* at the end, the leader's first */
    size_t message;                               /* bytes, of ways that send one after another */
};

struct shared { /* between the two from the start */
    _Alignas(64) atomic_uint ping;
    _Alignas(64) atomic_uint pong;
    _Alignas(64) atomic_bool last;
};

static const char *const names[] = {"xenfs", "unix"};
static const struct work *work;
static unsigned other_domid;
static int wire = -1;                       /* to the other process */
static struct libxenvchan *vchan, *through; /* messages go `through` it, or over the wire */
static struct shared *shared;
static uint64_t moved;    /* bytes */
static uint32_t *samples; /* ns */
static size_t count, room;
static volatile sig_atomic_t finished;

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *format, ...) {
    int error = errno;
    va_list words;
    va_start(words, format);
    fprintf(stderr, "devxen-bench: ");
    vfprintf(stderr, format, words);
    fprintf(stderr, ": %s\n", error ? strerror(error) : "not what was expected");
    fflush(stderr);
    _exit(1);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND_NS + (uint64_t)time.tv_nsec;
}

static void *memory(size_t size, int flags) {
    void *found = mmap(NULL, size, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (found == MAP_FAILED)
        die("%zu bytes of memory", size);
    return found;
}

static void put(const void *data, size_t size) {
    for (size_t done = 0; done < size;) {
        const char *rest = (const char *)data + done;
        ssize_t sent = through ? libxenvchan_write(through, rest, size - done) : send(wire, rest, size - done, MSG_NOSIGNAL);
        if (sent <= 0)
            die("sending %zu bytes", size);
        done += (size_t)sent;
    }
}

static void get(void *data, size_t size) {
    for (size_t done = 0; done < size;) {
        char *rest = (char *)data + done;
        ssize_t came = through ? libxenvchan_read(through, rest, size - done) : recv(wire, rest, size - done, 0);
        if (came <= 0)
            die("receiving %zu bytes", size);
        done += (size_t)came;
    }
}

static void record(uint64_t took) {
    if (count == room) {
        room = room ? 2 * room : 1 << 16;
        if (!(samples = realloc(samples, room * sizeof(*samples))))
            die("memory");
    }
    samples[count++] = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
}

/* -> how long it really took, with the last one's answer. */
static uint64_t lead_for(const struct way *way, uint64_t length_ns) {
    uint64_t start, began, end;
    atomic_store(&shared->last, false);
    through = NULL;
    put("", 1);
    through = way->vchan ? vchan : NULL;
    count = moved = 0;
    for (start = end = now(); end - start < length_ns; record(end - began)) {
        began = end;
        way->lead(false);
        end = now();
    }
    if (way->follow)
        way->lead(true);
    return now() - start;
}

static void follow_once(const struct way *way) {
    char byte;
    through = NULL;
    get(&byte, 1);
    through = way->vchan ? vchan : NULL;
    while (way->follow && !way->follow())
        continue;
}

static int ascending(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

static void report(const char *name, uint64_t took_ns) {
    qsort(samples, count, sizeof(*samples), ascending);
    printf("\"%s\": {\"count\": %zu, \"median_us\": %.3f, ", name, count, samples[(count - 1) / 2] / 1e3);
    printf("\"p99_us\": %.3f, ", samples[(count * 99 + 99) / 100 - 1] / 1e3);
    printf("\"bytes_per_s\": %.1f}", (double)moved * SECOND_NS / (double)took_ns);
}

/* A namespace in which /dev has nothing but xen, and that is this domain's. */
static void enter(const char *dev_xen) {
    char source[64];
    int folder;
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        die("a mount namespace");
    if ((folder = open(dev_xen, O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
        die("%s", dev_xen);
    snprintf(source, sizeof(source), "/proc/self/fd/%d", folder);
    if (mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k") || mkdir("/dev/xen", 0755) ||
        mount(source, "/dev/xen", NULL, MS_BIND, NULL))
        die("%s at /dev/xen", dev_xen);
    close(folder);
    setenv("XENSTORED_PATH", "/dev/xen/xenbus", 1);
}

static void follow(const char *dev_xen, unsigned first) {
    char byte;
    enter(dev_xen);
    if (work->prepare_peer)
        work->prepare_peer();
    for (unsigned turn = 0; turn < 4; turn++) /* each way is warmed up first */
        follow_once(&work->ways[(turn / 2 + first) % 2]);
    through = NULL;
    get(&byte, 1);
    if (work->check_peer)
        work->check_peer();
}

static void lead(const char *dev_xen, unsigned first, uint64_t length_ns) {
    enter(dev_xen);
    if (work->prepare)
        work->prepare();
    for (unsigned turn = 0; turn < 2; turn++) {
        unsigned which = (turn + first) % 2;
        uint64_t took_ns;
        lead_for(&work->ways[which], WARM_NS);
        took_ns = lead_for(&work->ways[which], length_ns);
        printf("%s", turn ? ", " : "{");
        report(names[which], took_ns);
    }
    through = NULL;
    if (work->check)
        work->check();
    finished = 1;
    put("", 1);
}

static void child_ended(int number) {
    (void)number;
    if (!finished) /* it has said why */
        _exit(1);
}

/* The leader's and the peer's dev/xen and domids, in that order. */
static int run(unsigned first, uint64_t length_ns, char **sides) {
    int wires[2], status = 0;
    pid_t parent = getpid(), peer;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* whoever started this is the one it works for */
    shared = memory(sizeof(*shared), MAP_SHARED);
    signal(SIGCHLD, child_ended);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, wires) || (peer = fork()) < 0)
        die("another process");
    wire = wires[peer ? 0 : 1];
    close(wires[peer ? 1 : 0]);
    other_domid = (unsigned)atoi(sides[peer ? 3 : 1]);
    if (!peer) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            return 1;
        follow(sides[2], first);
        return 0;
    }
    lead(sides[0], first, length_ns);
    if (waitpid(peer, &status, 0) != peer || status)
        _exit(1); /* without an answer: the other one has found something wrong, and said it */
    printf("}\n");
    return 0;
}
