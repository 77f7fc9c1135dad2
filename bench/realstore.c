/*
 * realstore.c: what libxenctrl, libxengnttab and libxenevtchn are to xenstored and oxenstored, without Xen.
 *
 * Compiled and preloaded by realstore.py, which is the hypervisor of this small world. They meet in one folder:
 *   domains    one byte per domid, shared: bits below
 *   ring-N     the page of domain N that holds its xenstore ring; whatever is mapped of N is this page
 *   events     FIFO of evtchn_port_t, host order: events for the daemon
 *   kick-N     FIFO: a byte in it is an event for domain N. If it is full N has not looked for long, and still will
 *   xsd_port   domain 0's port, as text
 * XENSTORED_RUNDIR is the folder, REALSTORE_PARENT the process the daemon must not outlive.
 *
 * Kept: a bound port starts out pending; what Xen refuses is refused with its errno. Left out: masking (an event may come
 * twice, never too seldom), events of a port that is bound no more, and libxenmanage, with which Xen 4.21 asks for domains.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <xenctrl.h>
#include <xenevtchn.h>
#include <xengnttab.h>

/* Also in realstore.py. */
enum { EXISTS = 1, SHUTDOWN = 2, DYING = 4, REASON_SHIFT = 4 };
enum { VIRQ_PORT = 1, FIRST_PORT = 1000 };
enum { PAGE_BYTES = 4096, XENSTORE_GREF = 1 };

static const char *folder;
static const volatile unsigned char *domains; /* DOMID_FIRST_RESERVED bytes */
static int events = -1;
static int kicks[DOMID_FIRST_RESERVED];       /* descriptor of kick-N plus one, or 0: not bound */
static char handle;                           /* has an address, and no more is asked of it */

static void die(const char *what)
{
    fprintf(stderr, "realstore: %s: %s\n", what, strerror(errno));
    _exit(1);
}

static void name(char *path, const char *file)
{
    if (snprintf(path, PATH_MAX, "%s/%s", folder, file) >= PATH_MAX)
        die("folder");
}

static void name_of(char *path, const char *kind, unsigned int domid)
{
    if (snprintf(path, PATH_MAX, "%s/%s-%u", folder, kind, domid) >= PATH_MAX)
        die("folder");
}

static int real_open(const char *path, int flags, mode_t mode)
{
    __typeof__(open64) *next = dlsym(RTLD_NEXT, "open64");

    return next(path, flags, mode);
}

__attribute__((constructor)) static void start(void)
{
    const char *parent = getenv("REALSTORE_PARENT");
    char path[PATH_MAX];
    int fd;

    folder = getenv("XENSTORED_RUNDIR");
    if (!folder || !parent) {
        errno = EINVAL;
        die("XENSTORED_RUNDIR and REALSTORE_PARENT");
    }
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != atoi(parent))
        die("the parent is gone");
    name(path, "domains");
    fd = real_open(path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0)
        die(path);
    domains = mmap(NULL, DOMID_FIRST_RESERVED, PROT_READ, MAP_SHARED, fd, 0);
    if (domains == MAP_FAILED)
        die(path);
    close(fd);
}

static unsigned char state(uint32_t domid) { return domid < DOMID_FIRST_RESERVED ? domains[domid] : 0; }

/* ---- files: those of /proc/xen, and oxenstored's folder, which is compiled in ---- */

static const char *redirect(const char *path, char *buffer)
{
    static const char run[] = "/run/xenstored";
    const size_t length = sizeof(run) - 1;
    const char *rest = strncmp(path, "/var", 4) ? path : path + 4;

    if (!strcmp(path, "/proc/xen/xsd_port"))
        name(buffer, "xsd_port");
    else if (!strcmp(path, "/proc/xen/xsd_kva"))
        name_of(buffer, "ring", 0);
    else if (!strncmp(rest, run, length) && (rest[length] == '/' || !rest[length]))
        name(buffer, rest + length);
    else
        return path;
    return buffer;
}

int open64(const char *path, int flags, ...)
{
    char buffer[PATH_MAX];
    mode_t mode = 0;
    va_list more;

    va_start(more, flags);
    if (flags & (O_CREAT | __O_TMPFILE))
        mode = va_arg(more, mode_t);
    va_end(more);
    return real_open(redirect(path, buffer), flags, mode);
}

int open(const char *path, int flags, ...) __attribute__((alias("open64")));

int mkdir(const char *path, mode_t mode)
{
    __typeof__(mkdir) *next = dlsym(RTLD_NEXT, "mkdir");
    char buffer[PATH_MAX];

    return next(redirect(path, buffer), mode);
}

int unlink(const char *path)
{
    __typeof__(unlink) *next = dlsym(RTLD_NEXT, "unlink");
    char buffer[PATH_MAX];

    return next(redirect(path, buffer));
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    __typeof__(bind) *next = dlsym(RTLD_NEXT, "bind");
    struct sockaddr_un ours = { .sun_family = AF_UNIX };
    char path[sizeof(ours.sun_path) + 1] = "", buffer[PATH_MAX];
    const size_t before = offsetof(struct sockaddr_un, sun_path);
    const char *there;

    if (address->sa_family != AF_UNIX || length <= before || length > sizeof(ours))
        return next(fd, address, length);
    memcpy(path, ((const struct sockaddr_un *)address)->sun_path, length - before);
    there = redirect(path, buffer);
    if (there == path)
        return next(fd, address, length);
    if (strlen(there) >= sizeof(ours.sun_path)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(ours.sun_path, there);
    return next(fd, (const struct sockaddr *)&ours, sizeof(ours));
}

/* oxenstored asks for more descriptors than an ordinary user may have, and ends if it is refused. */
int setrlimit(__rlimit_resource_t resource, const struct rlimit *limit) { return 0; }

/* ---- the system's log is not for daemons under test ---- */

void __syslog_chk(int priority, int flag, const char *format, ...);
void __syslog_chk(int priority, int flag, const char *format, ...)
{
    va_list more;

    fputs("syslog: ", stderr);
    va_start(more, format);
    vfprintf(stderr, format, more);
    va_end(more);
    fputc('\n', stderr);
}

/* ---- libxenctrl: domains ---- */

xc_interface *xc_interface_open(xentoollog_logger *logger, xentoollog_logger *other, unsigned int flags)
{
    return (xc_interface *)&handle;
}

int xc_interface_close(xc_interface *xch) { return 0; }

const xc_error *xc_get_last_error(xc_interface *xch)
{
    static const xc_error none; /* look at errno */

    return &none;
}

static void fill(xc_domaininfo_t *info, unsigned int domid)
{
    unsigned char now = state(domid);

    memset(info, 0, sizeof(*info));
    info->domain = domid;
    info->flags = now & DYING ? XEN_DOMINF_dying : 0;
    if (now & SHUTDOWN)
        info->flags |= XEN_DOMINF_shutdown | (uint32_t)(now >> REASON_SHIFT) << XEN_DOMINF_shutdownshift;
    else
        info->flags |= XEN_DOMINF_running;
}

int xc_domain_getinfolist(xc_interface *xch, uint32_t first, unsigned int most, xc_domaininfo_t *info)
{
    unsigned int domid, found = 0;

    for (domid = first; domid < DOMID_FIRST_RESERVED && found < most; domid++)
        if (state(domid) & EXISTS)
            fill(&info[found++], domid);
    return (int)found;
}

#if XEN_DOMCTL_INTERFACE_VERSION < 0x16 /* until Xen 4.17 */
int xc_domain_getinfo(xc_interface *xch, uint32_t first, unsigned int most, xc_dominfo_t *info)
{
    xc_domaininfo_t one;
    unsigned int found;

    for (found = 0; found < most && xc_domain_getinfolist(xch, first, 1, &one) == 1; found++) {
        unsigned int reason = one.flags >> XEN_DOMINF_shutdownshift & XEN_DOMINF_shutdownmask;

        memset(&info[found], 0, sizeof(info[found]));
        info[found].domid = one.domain;
        info[found].dying = !!(one.flags & XEN_DOMINF_dying);
        info[found].running = !!(one.flags & XEN_DOMINF_running);
        info[found].shutdown = !!(one.flags & XEN_DOMINF_shutdown);
        info[found].shutdown_reason = reason;
        if (info[found].shutdown && reason == SHUTDOWN_crash) {
            info[found].shutdown = 0; /* as libxenctrl has it: one or the other */
            info[found].crashed = 1;
        }
        first = one.domain + 1;
    }
    if (!found && most) {
        errno = ESRCH;
        return -1;
    }
    return (int)found;
}
#else
int xc_domain_getinfo_single(xc_interface *xch, uint32_t domid, xc_domaininfo_t *info)
{
    if (!(state(domid) & EXISTS)) {
        errno = ESRCH;
        return -1;
    }
    return xc_domain_getinfolist(xch, domid, 1, info) == 1 ? 0 : -1;
}
#endif

/* ---- libxengnttab, and the foreign mapping of oxenstored: always a domain's one page ---- */

static void *map_ring(uint32_t domid, int prot)
{
    char path[PATH_MAX];
    void *page;
    int fd;

    name_of(path, "ring", domid);
    fd = state(domid) & EXISTS ? real_open(path, O_RDWR | O_CLOEXEC, 0) : -1;
    if (fd < 0) {
        errno = EINVAL; /* as the mmap of /dev/xen/gntdev says */
        return NULL;
    }
    page = mmap(NULL, PAGE_BYTES, prot, MAP_SHARED, fd, 0);
    close(fd);
    return page == MAP_FAILED ? NULL : page;
}

void *xc_map_foreign_range(xc_interface *xch, uint32_t domid, int size, int prot, unsigned long mfn)
{
    if (size != PAGE_BYTES) {
        errno = EINVAL;
        return NULL;
    }
    return map_ring(domid, prot);
}

xengnttab_handle *xengnttab_open(xentoollog_logger *logger, unsigned int flags) { return (xengnttab_handle *)&handle; }
int xengnttab_close(xengnttab_handle *xgt) { return 0; }
int xengnttab_set_max_grants(xengnttab_handle *xgt, uint32_t count) { return 0; }

void *xengnttab_map_grant_ref(xengnttab_handle *xgt, uint32_t domid, uint32_t ref, int prot)
{
    if (ref != XENSTORE_GREF) {
        errno = EINVAL;
        return NULL;
    }
    return map_ring(domid, prot);
}

int xengnttab_unmap(xengnttab_handle *xgt, void *start_address, uint32_t count)
{
    return munmap(start_address, (size_t)count * PAGE_BYTES);
}

/* ---- libxenevtchn ---- */

xenevtchn_handle *xenevtchn_open(xentoollog_logger *logger, unsigned int flags)
{
    char path[PATH_MAX];

    name(path, "events");
    events = real_open(path, O_RDWR | O_NONBLOCK | (flags & XENEVTCHN_NO_CLOEXEC ? 0 : O_CLOEXEC), 0);
    return events < 0 ? NULL : (xenevtchn_handle *)&handle;
}

xenevtchn_handle *xenevtchn_fdopen(xentoollog_logger *logger, int fd, unsigned int flags)
{
    events = fd;
    return (xenevtchn_handle *)&handle;
}

int xenevtchn_close(xenevtchn_handle *xce) { return close(events); }
int xenevtchn_fd(xenevtchn_handle *xce) { return events; }
static bool valid(evtchn_port_t port) { return port >= FIRST_PORT && port - FIRST_PORT < DOMID_FIRST_RESERVED; }

static int *kick_of(evtchn_port_t port)
{
    char path[PATH_MAX];
    int *kick = &kicks[port - FIRST_PORT];

    if (!*kick) {
        name_of(path, "kick", port - FIRST_PORT);
        *kick = 1 + real_open(path, O_WRONLY | O_NONBLOCK, 0); /* outlives an exec, as bound ports do */
    }
    return kick;
}

xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *xce, uint32_t domid, evtchn_port_t remote_port)
{
    evtchn_port_t port = FIRST_PORT + domid;

    if (!(state(domid) & EXISTS)) {
        errno = ESRCH;
        return -1;
    }
    if (!remote_port || kicks[domid] || !*kick_of(port)) {
        errno = EINVAL; /* not a port that waits for us */
        return -1;
    }
    if (write(events, &port, sizeof(port)) != sizeof(port) && errno != EAGAIN)
        return -1;
    return (xenevtchn_port_or_error_t)port;
}

xenevtchn_port_or_error_t xenevtchn_bind_virq(xenevtchn_handle *xce, unsigned int virq)
{
    if (virq == VIRQ_DOM_EXC)
        return VIRQ_PORT;
    errno = EINVAL;
    return -1;
}

int xenevtchn_unbind(xenevtchn_handle *xce, evtchn_port_t port)
{
    if (port == VIRQ_PORT)
        return 0;
    if (!valid(port) || !kicks[port - FIRST_PORT]) {
        errno = EINVAL;
        return -1;
    }
    close(kicks[port - FIRST_PORT] - 1);
    kicks[port - FIRST_PORT] = 0;
    return 0;
}

int xenevtchn_notify(xenevtchn_handle *xce, evtchn_port_t port)
{
    if (!valid(port) || !*kick_of(port)) { /* after an exec it knows its ports by number */
        errno = EINVAL;
        return -1;
    }
    if (write(kicks[port - FIRST_PORT] - 1, "", 1) == 1 || errno == EAGAIN)
        return 0;
    return errno == EPIPE ? 0 : -1; /* the domain has closed: its port is gone, which a sender does not see */
}

xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *xce)
{
    evtchn_port_t port;

    return read(events, &port, sizeof(port)) == sizeof(port) ? (xenevtchn_port_or_error_t)port : -1;
}

int xenevtchn_unmask(xenevtchn_handle *xce, evtchn_port_t port) { return 0; }
