/*
 * events.c: libxenevtchn behind a command line. Commands and replies are those of lines.h.
 *
 * Everything is done with the one handle that `open` makes (the program starts with one open).
 */
#include "lines.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/time.h>
#include <xenevtchn.h>
#include <xen/sys/evtchn.h>

#define MOST_PORTS 2048

static xenevtchn_handle *events;

static void open_events(int words, char **word)
{
    (void)words, (void)word;
    events = xenevtchn_open(NULL, 0);
    reply_done(events ? 0 : -1);
}

static void close_events(int words, char **word)
{
    (void)words, (void)word;
    reply_done(xenevtchn_close(events));
    events = NULL;
}

static void fd(int words, char **word)
{
    (void)words, (void)word;
    reply_number(xenevtchn_fd(events));
}

static void bind_virq(int words, char **word)
{
    (void)words;
    reply_number(xenevtchn_bind_virq(events, number(word[0])));
}

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

static void restrict_to(int words, char **word)
{
    (void)words;
    reply_done(xenevtchn_restrict(events, number(word[0])));
}

static void reset(int words, char **word)
{
    (void)words, (void)word;
    reply_done(ioctl(xenevtchn_fd(events), IOCTL_EVTCHN_RESET, NULL));
}

/* An ioctl of any number with any pointer. */
static void raw_ioctl(int words, char **word)
{
    (void)words;
    reply_number(ioctl(xenevtchn_fd(events), strtoul(word[0], NULL, 0), (void *)strtoul(word[1], NULL, 0)));
}

static void notify(int words, char **word)
{
    int times = words > 1 ? (int)number(word[1]) : 1, result = 0;

    for (int i = 0; i < times && !result; i++)
        result = xenevtchn_notify(events, number(word[0]));
    reply_done(result);
}

static void unmask(int words, char **word)
{
    int result = 0;

    for (int i = 0; i < words && !result; i++)
        result = xenevtchn_unmask(events, number(word[i]));
    reply_done(result);
}

static void unbind(int words, char **word)
{
    int result = 0;

    for (int i = 0; i < words && !result; i++)
        result = xenevtchn_unbind(events, number(word[i]));
    reply_done(result);
}

static void pending(int words, char **word)
{
    (void)words, (void)word;
    reply_number(xenevtchn_pending(events));
}

/* All ports that one read(2) of so many bytes returns. */
static void read_bytes(int words, char **word)
{
    static evtchn_port_t ports[MOST_PORTS];
    size_t size = number(word[0]);
    ssize_t got = read(xenevtchn_fd(events), ports, size < sizeof(ports) ? size : sizeof(ports));

    (void)words;
    if (got < 0) {
        reply_error();
        return;
    }
    printf("%zd", got);
    for (ssize_t i = 0; i < got / 4; i++)
        printf(" %u", ports[i]);
    reply("");
}

static void nonblock(int words, char **word)
{
    int flags = fcntl(xenevtchn_fd(events), F_GETFL);

    (void)words;
    flags = strcmp(word[0], "on") ? flags & ~O_NONBLOCK : flags | O_NONBLOCK;
    reply_done(fcntl(xenevtchn_fd(events), F_SETFL, flags));
}

static void reply_ready(int result, bool in, bool out, bool error)
{
    if (result < 0)
        reply_error();
    else if (!in && !out && !error)
        reply("timeout");
    else
        reply("%s", error ? "error" : in ? "in" : "out");
}

static void wait_poll(int words, char **word)
{
    struct pollfd waiter = {.fd = xenevtchn_fd(events), .events = POLLIN};
    int result = poll(&waiter, 1, (int)number(word[0]));

    (void)words;
    reply_ready(result, waiter.revents & POLLIN, false, waiter.revents & (POLLERR | POLLHUP));
}

static void wait_select(int words, char **word)
{
    int timeout_ms = (int)number(word[0]), fd = xenevtchn_fd(events);
    struct timeval timeout = {.tv_sec = timeout_ms / 1000, .tv_usec = timeout_ms % 1000 * 1000};
    fd_set set;
    int result;

    (void)words;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    result = select(fd + 1, &set, NULL, NULL, &timeout);
    reply_ready(result, result > 0 && FD_ISSET(fd, &set), false, false);
}

static void wait_epoll(int words, char **word)
{
    struct epoll_event wanted = {.events = EPOLLIN}, got = {0};
    int epoll = epoll_create1(EPOLL_CLOEXEC), result;

    (void)words;
    result = epoll_ctl(epoll, EPOLL_CTL_ADD, xenevtchn_fd(events), &wanted);
    if (!result)
        result = epoll_wait(epoll, &got, 1, (int)number(word[0]));
    reply_ready(result, got.events & EPOLLIN, false, got.events & (EPOLLERR | EPOLLHUP));
    close(epoll);
}

static void writable(int words, char **word)
{
    struct pollfd waiter = {.fd = xenevtchn_fd(events), .events = POLLOUT};
    int result = poll(&waiter, 1, 0);

    (void)words, (void)word;
    reply_ready(result, false, waiter.revents & POLLOUT, waiter.revents & (POLLERR | POLLHUP));
}

static void on_alarm(int signal_number)
{
    (void)signal_number;
}

/* SIGALRM so many milliseconds later, with a handler and no restart of system calls. */
static void set_alarm(int words, char **word)
{
    struct sigaction action = {.sa_handler = on_alarm};
    struct itimerval timer = {.it_value = {.tv_usec = number(word[0]) * 1000L}};

    (void)words;
    sigaction(SIGALRM, &action, NULL);
    reply_done(setitimer(ITIMER_REAL, &timer, NULL));
}

static int answer(evtchn_port_t port, bool first)
{
    if (first && xenevtchn_notify(events, port))
        return -1;
    if (xenevtchn_pending(events) != (int)port) {
        errno = EPROTO;
        return -1;
    }
    if (xenevtchn_unmask(events, port) || (!first && xenevtchn_notify(events, port)))
        return -1;
    return 0;
}

/* `rally PORT N`: N times send, wait, unmask. `return PORT N`: N times wait, unmask, send. */
static void rally(int words, char **word)
{
    int result = 0;

    (void)words;
    for (uint32_t i = 0; i < number(word[1]) && !result; i++)
        result = answer(number(word[0]), true);
    reply_done(result);
}

static void return_all(int words, char **word)
{
    int result = 0;

    (void)words;
    for (uint32_t i = 0; i < number(word[1]) && !result; i++)
        result = answer(number(word[0]), false);
    reply_done(result);
}

/* Binds and unbinds for ever: somebody will kill us. */
static void churn(int words, char **word)
{
    unsigned int seed = number(word[0]);
    uint32_t domid = number(word[1]);
    int ports[16], bound = 0;

    (void)words;
    for (;;) {
        if (bound < 16 && (!bound || rand_r(&seed) % 2)) {
            int port = xenevtchn_bind_unbound_port(events, domid);

            if (port < 0)
                break;
            ports[bound++] = port;
        } else if (xenevtchn_notify(events, ports[--bound]) || xenevtchn_unbind(events, ports[bound])) {
            break;
        }
    }
    reply_error();
}

static void quit(int words, char **word)
{
    (void)words, (void)word;
    exit(xenevtchn_close(events) ? 1 : 0);
}

static const struct command COMMANDS[] = {
    {"open", 0, open_events},
    {"close", 0, close_events},
    {"fd", 0, fd},
    {"bind-virq", 1, bind_virq},               /* VIRQ -> port */
    {"bind-unbound", 1, bind_unbound},         /* DOMID -> port */
    {"bind-interdomain", 2, bind_interdomain}, /* DOMID PORT -> port */
    {"restrict", 1, restrict_to},              /* DOMID */
    {"reset", 0, reset},
    {"ioctl", 2, raw_ioctl},                   /* NUMBER POINTER -> result */
    {"notify", 1, notify},                     /* PORT [TIMES] */
    {"unmask", 1, unmask},                     /* PORT... */
    {"unbind", 1, unbind},                     /* PORT... */
    {"pending", 0, pending},                   /* -> port; waits */
    {"read", 1, read_bytes},                   /* BYTES -> bytes read, the ports; waits */
    {"nonblock", 1, nonblock},                 /* on|off */
    {"poll", 1, wait_poll},                    /* MS -> in, timeout or error */
    {"select", 1, wait_select},
    {"epoll", 1, wait_epoll},
    {"writable", 0, writable},                 /* -> out, timeout or error */
    {"alarm", 1, set_alarm},                   /* MS, below 1000 */
    {"rally", 2, rally},                       /* PORT N */
    {"return", 2, return_all},                 /* PORT N */
    {"churn", 2, churn},                       /* SEED DOMID */
    {"quit", 0, quit},
    {NULL, 0, NULL},
};

int main(void)
{
    events = xenevtchn_open(NULL, 0);
    if (!events) {
        perror("xenevtchn_open");
        return 1;
    }
    return run_lines(COMMANDS);
}
