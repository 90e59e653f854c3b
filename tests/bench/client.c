/* client: asks a key server as a Wazuh manager does, with N threads at once.
 *
 * For every request: connect, one send (no newline, no half-close), one recv of 65,536 bytes,
 * close (MANAGER.md, "Socket method"). What comes back counts as an answer when it starts with
 * '{"error": '; an answer with `"error": 0` must also name the id that was asked for.
 *
 *   client [-t THREADS] [-n COUNT] [-d SECONDS] [-w SECONDS] (-r FIRST-LAST | -f FILE) SOCKET
 *
 *   -t   threads, 32 by default (the most that a manager has)
 *   -n   stop after COUNT requests   -d   stop after SECONDS; with neither: at SIGTERM or SIGINT
 *   -w   the longest wait for one answer, 60 s by default as in the manager
 *   -r   asks id:FIRST ... id:LAST, all over the range; -f asks the lines of FILE, round and round
 *
 * One line on stdout: pairs of name=number (rate is in answers per second, *_us are microseconds).
 * The first few failures are told on stderr. Exit status 0 when the line was printed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    ANSWER_BYTES = 65536,   /* what the manager reads, once */
    SLOT_US = 10,           /* one slot of the latency histogram */
    SLOTS = 100001,         /* up to one second; the last slot takes the rest */
    TOLD = 5                /* failures told on stderr */
};
static const char ERROR_PREFIX[] = "{\"error\": ";

enum outcome { ANSWER, NO_CONNECT, NO_SEND, NO_ANSWER, CLOSED, MALFORMED, WRONG, OUTCOMES };
static const char *const OUTCOME_NAMES[OUTCOMES] = {
    "answers", "connect", "send", "receive", "closed", "malformed", "wrong"
};

static struct {
    struct sockaddr_un address;
    struct timeval wait;
    long threads, count, first, last;
    double seconds;
    char **lines;
    size_t line_count;
} options = { .threads = 32, .wait = { 60, 0 } };

struct worker {
    pthread_t thread;
    uint64_t outcomes[OUTCOMES], found, longest_us;
    uint32_t histogram[SLOTS];
};

static atomic_long next_request;
static atomic_int failures_told;
static atomic_bool stopping;

static void stop(int signal_number)
{
    (void)signal_number;
    atomic_store(&stopping, 1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void die(const char *what)
{
    fprintf(stderr, "client: %s\n", what);
    exit(2);
}

/* The request number k: a line of the file, or an id out of the range, far from the one before. */
static size_t request_text(long k, char *text, size_t room)
{
    if (options.line_count)
        return (size_t)snprintf(text, room, "%s", options.lines[(size_t)k % options.line_count]);
    uint64_t span = (uint64_t)(options.last - options.first) + 1;
    uint64_t scattered = ((uint64_t)k * 2654435761u) % span;
    return (size_t)snprintf(text, room, "id:%03ld", options.first + (long)scattered);
}

/* An answer with a key must be the answer to this request and to no other. */
static enum outcome judge(const char *request, char *answer, ssize_t length, uint64_t *found)
{
    char wanted[64];
    answer[length] = 0;
    if (strncmp(answer, ERROR_PREFIX, sizeof ERROR_PREFIX - 1) != 0)
        return MALFORMED;
    if (answer[sizeof ERROR_PREFIX - 1] != '0')
        return ANSWER;
    ++*found;
    if (strncmp(request, "id:", 3) != 0)
        return ANSWER;
    snprintf(wanted, sizeof wanted, "\"id\": \"%.40s\"", request + 3);
    return strstr(answer, wanted) ? ANSWER : WRONG;
}

static enum outcome ask(const char *request, size_t length, char *answer, uint64_t *found)
{
    enum outcome outcome;
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0)
        return NO_CONNECT;
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &options.wait, sizeof options.wait);
    setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &options.wait, sizeof options.wait);
    if (connect(connection, (struct sockaddr *)&options.address, sizeof options.address) < 0) {
        outcome = NO_CONNECT;
    } else if (send(connection, request, length, MSG_NOSIGNAL) != (ssize_t)length) {
        outcome = NO_SEND;
    } else {
        ssize_t got = recv(connection, answer, ANSWER_BYTES, 0);
        outcome = got < 0 ? NO_ANSWER : got == 0 ? CLOSED : judge(request, answer, got, found);
    }
    int error = errno;
    close(connection);
    errno = error;
    return outcome;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    char *answer = malloc(ANSWER_BYTES + 1);
    char request[256];
    if (!answer)
        die("out of memory");
    while (!atomic_load(&stopping)) {
        long k = atomic_fetch_add(&next_request, 1);
        if (options.count && k >= options.count)
            break;
        size_t length = request_text(k, request, sizeof request);
        double start = now();
        enum outcome outcome = ask(request, length, answer, &worker->found);
        int error = errno;
        uint64_t took_us = (uint64_t)((now() - start) * 1e6);
        worker->outcomes[outcome]++;
        if (outcome != ANSWER && atomic_fetch_add(&failures_told, 1) < TOLD)
            fprintf(stderr, "client: %s: %s (%s)\n", request, OUTCOME_NAMES[outcome],
                    outcome <= NO_ANSWER ? strerror(error) : "see the answer");
        if (outcome != ANSWER)
            continue;
        worker->histogram[took_us / SLOT_US < SLOTS ? took_us / SLOT_US : SLOTS - 1]++;
        if (took_us > worker->longest_us)
            worker->longest_us = took_us;
    }
    free(answer);
    return NULL;
}

static unsigned long quantile_us(const uint64_t *histogram, uint64_t total, double part)
{
    uint64_t seen = 0;
    for (size_t slot = 0; slot < SLOTS; slot++) {
        seen += histogram[slot];
        if (seen && (double)seen >= part * (double)total)
            return (unsigned long)slot * SLOT_US;
    }
    return 0;
}

static void report(struct worker *workers, double took)
{
    static uint64_t histogram[SLOTS];
    uint64_t outcomes[OUTCOMES] = { 0 }, found = 0, longest = 0, failures = 0;
    for (long i = 0; i < options.threads; i++) {
        for (int kind = 0; kind < OUTCOMES; kind++)
            outcomes[kind] += workers[i].outcomes[kind];
        for (size_t slot = 0; slot < SLOTS; slot++)
            histogram[slot] += workers[i].histogram[slot];
        found += workers[i].found;
        longest = workers[i].longest_us > longest ? workers[i].longest_us : longest;
    }
    for (int kind = ANSWER + 1; kind < OUTCOMES; kind++)
        failures += outcomes[kind];
    for (int kind = 0; kind < OUTCOMES; kind++)
        printf("%s=%lu ", OUTCOME_NAMES[kind], (unsigned long)outcomes[kind]);
    printf("failures=%lu found=%lu seconds=%.3f rate=%.0f p50_us=%lu p99_us=%lu max_us=%lu\n",
           (unsigned long)failures, (unsigned long)found, took,
           took > 0 ? (double)outcomes[ANSWER] / took : 0.0,
           quantile_us(histogram, outcomes[ANSWER], 0.50),
           quantile_us(histogram, outcomes[ANSWER], 0.99), (unsigned long)longest);
}

static void read_requests(const char *path)
{
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t room = 0, allocated = 0;
    ssize_t length;
    if (!file)
        die("cannot read the file of requests");
    while ((length = getline(&line, &room, file)) > 0) {
        line[strcspn(line, "\r\n")] = 0;
        if (!*line)
            continue;
        if (options.line_count == allocated) {
            allocated = allocated ? allocated * 2 : 1024;
            options.lines = realloc(options.lines, allocated * sizeof *options.lines);
            if (!options.lines)
                die("out of memory");
        }
        options.lines[options.line_count++] = strdup(line);
    }
    free(line);
    fclose(file);
    if (!options.line_count)
        die("no request in the file");
}

static void read_options(int argc, char **argv)
{
    int letter;
    while ((letter = getopt(argc, argv, "t:n:d:w:r:f:")) != -1) {
        switch (letter) {
        case 't': options.threads = atol(optarg); break;
        case 'n': options.count = atol(optarg); break;
        case 'd': options.seconds = atof(optarg); break;
        case 'w': options.wait.tv_sec = atol(optarg); break;
        case 'f': read_requests(optarg); break;
        case 'r':
            if (sscanf(optarg, "%ld-%ld", &options.first, &options.last) != 2
                || options.last < options.first)
                die("-r needs FIRST-LAST");
            break;
        default: die("see the head of client.c");
        }
    }
    if (optind + 1 != argc || options.threads < 1 || (!options.line_count && !options.last))
        die("see the head of client.c");
    options.address.sun_family = AF_UNIX;
    if (strlen(argv[optind]) >= sizeof options.address.sun_path)
        die("path too long for a socket");
    strcpy(options.address.sun_path, argv[optind]);
}

int main(int argc, char **argv)
{
    struct sigaction action = { .sa_handler = stop };
    read_options(argc, argv);
    struct worker *workers = calloc((size_t)options.threads, sizeof *workers);
    if (!workers)
        die("out of memory");
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    double start = now();
    for (long i = 0; i < options.threads; i++)
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            die("cannot start a thread");
    while (options.seconds > 0 && now() - start < options.seconds && !atomic_load(&stopping))
        usleep(10000);
    if (options.seconds > 0)
        stop(0);
    for (long i = 0; i < options.threads; i++)
        pthread_join(workers[i].thread, NULL);
    report(workers, now() - start);
    return 0;
}
