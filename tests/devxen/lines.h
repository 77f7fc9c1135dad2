/*
 * lines.h: what the test programs share: commands on stdin, one line each, and exactly one line of reply on stdout.
 *
 * A refused call is `error NAME` with errno's name. A page that cannot be reached, in the program or in a library, is
 * `fault`, and the program goes on. What libraries say goes to stderr, which is no part of the protocol.
 * To be included first.
 */
#ifndef DEVXEN_LINES_H
#define DEVXEN_LINES_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* strerrorname_np */
#endif

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST_WORDS 1200 /* 1024 references and a few words */

struct command {
    const char *name;
    int words; /* that it needs at least, without its own */
    void (*run)(int words, char **word);
};

static sigjmp_buf fault_exit;
static volatile sig_atomic_t in_command;

static inline void reply(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

static inline void reply_error(void)
{
    const char *name = strerrorname_np(errno);

    reply("error %s", name ? name : "?");
}

/* A call that returns a number, or -1 and errno. */
static inline void reply_number(long result)
{
    if (result < 0)
        reply_error();
    else
        reply("%ld", result);
}

/* A call that returns 0, or -1 and errno. */
static inline void reply_done(int result)
{
    if (result)
        reply_error();
    else
        reply("ok");
}

static inline uint32_t number(const char *word)
{
    return (uint32_t)strtol(word, NULL, 0);
}

static void on_fault(int signal_number)
{
    if (in_command)
        siglongjmp(fault_exit, 1);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static inline void run_guarded(const struct command *command, int words, char **word)
{
    if (sigsetjmp(fault_exit, 1)) {
        in_command = 0;
        reply("fault");
        return;
    }
    in_command = 1;
    errno = 0;
    command->run(words, word);
    in_command = 0;
}

static inline void run_line(const struct command *commands, char *line)
{
    static char *word[MOST_WORDS];
    const struct command *command = commands;
    int words = 0;
    char *rest = NULL;

    for (char *next = strtok_r(line, " \n", &rest); next && words < MOST_WORDS; next = strtok_r(NULL, " \n", &rest))
        word[words++] = next;
    if (!words)
        return;
    while (command->name && strcmp(command->name, word[0]))
        command++;
    if (!command->name)
        reply("unknown %s", word[0]);
    else if (words - 1 < command->words)
        reply("usage: %s needs %d words", command->name, command->words);
    else
        run_guarded(command, words - 1, word + 1);
}

/* Until the end of stdin; commands end with an entry without a name. */
static inline int run_lines(const struct command *commands)
{
    struct sigaction action = {.sa_handler = on_fault};
    char *line = NULL;
    size_t size = 0;

    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    while (getline(&line, &size, stdin) > 0)
        run_line(commands, line);
    free(line);
    return 0;
}

#endif
