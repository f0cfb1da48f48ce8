/* A relay that takes every mail, with the latency it is given, and counts. Linux only, one thread.

       sink PORT LATENCY_MS [PEM]

   Listens on 127.0.0.1 (port 0: a free one) and says "ports N 0" when it does. Ends on SIGTERM, or with its parent.
   Compiled with -DTLS -lssl -lcrypto, and with key and certificate in a PEM file, it listens on a second, free port with
   implicit TLS, and says "ports N M". Any login is right.
   A mail's 250 goes LATENCY_MS after its final dot. Meanwhile its connection's further commands wait, and all other
   connections go on. A mail counts when its 250 is due, unless its connection was reset before.
   XCOUNT answers "250 mails=N connections=N most=N": mails taken, connections that said EHLO or HELO, the most of these
   at one time. So whoever only asks for counts is not counted.

   It shares its cores with what is measured, so it saves system calls: edge-triggered epoll that is never modified, one
   recv and one send for all that came at once, no copy of a mail's content, one timer for the head of a queue. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

enum { INPUT = 1 << 16, OUTPUT = 1 << 16, LINE = 2048, REPLY = 256, EVENTS = 256 };

struct session {
    int fd;
#ifdef TLS
    SSL *tls; /* NULL: none */
#endif
    bool greeted;   /* it counts */
    bool sender;    /* MAIL was accepted */
    bool recipient; /* RCPT was accepted */
    bool in_mail;   /* after 354, before the final dot */
    bool waiting;   /* for its mail's 250; then it stands in the queue */
    bool readable;  /* there may be more to receive */
    bool hung_up;   /* the other side sends no more: receive until the end is seen */
    bool over;      /* close it once its replies are sent */
    bool broken;    /* close it */
    unsigned matched; /* bytes of END that stand at the end of the content so far */
    size_t line_length;
    char line[LINE]; /* the command so far */
    char *held;      /* received, not yet dealt with */
    size_t held_length;
    char *unsent; /* replies that the socket did not take */
    size_t unsent_length;
    int64_t due; /* ns */
    struct session *earlier, *later;
};

#define BANNER "220 sink\r\n"
static const char END[] = "\r\n.\r\n";

static int epoll, listener, timer;
static int tls_listener = -1;
#ifdef TLS
static SSL_CTX *tls;
#endif
static int64_t latency; /* ns */
static uint64_t mails, connections, most;
static struct session *first, *last; /* the queue: all wait equally long, so it is in order of `due` */
static char input[INPUT], output[OUTPUT]; /* of the session that is being served */
static size_t output_length;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void *allocate(size_t size) {
    void *memory = calloc(1, size);
    if (!memory) fail("calloc");
    return memory;
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* The queue */

static void set_timer(void) {
    struct itimerspec when = {.it_value = {.tv_sec = first->due / 1000000000, .tv_nsec = first->due % 1000000000}};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL)) fail("timerfd_settime");
}

static void enqueue(struct session *s) {
    s->waiting = true;
    s->due = now() + latency;
    s->earlier = last;
    s->later = NULL;
    if (last) {
        last->later = s;
        last = s;
    } else {
        first = last = s;
        set_timer();
    }
}

static void dequeue(struct session *s) {
    *(s->earlier ? &s->earlier->later : &first) = s->later;
    *(s->later ? &s->later->earlier : &last) = s->earlier;
    s->waiting = false;
}

/* The protocol */

__attribute__((format(printf, 1, 2))) static void reply(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    output_length += (size_t)vsnprintf(output + output_length, REPLY, format, arguments);
    va_end(arguments);
}

static void accept_mail(void) {
    mails++;
    reply("250 taken\r\n");
}

static bool says(const struct session *s, const char *verb) {
    return !strncasecmp(s->line, verb, strlen(verb));
}

static void forget_transaction(struct session *s) {
    s->sender = s->recipient = false;
}

static void greet(struct session *s, const char *answer) {
    if (!s->greeted && ++connections > most) most = connections;
    s->greeted = true;
    forget_transaction(s);
    reply("%s", answer);
}

static void on_command(struct session *s) {
    bool in_order = true;
    if (says(s, "MAIL")) {
        in_order = !s->sender;
        s->sender = true;
    } else if (says(s, "RCPT")) {
        in_order = s->sender;
        s->recipient |= s->sender;
    } else if (says(s, "DATA")) {
        in_order = s->recipient;
        s->in_mail = s->recipient;
        s->matched = 2; /* the content begins a line */
        if (in_order) return reply("354 go on\r\n");
    } else if (says(s, "RSET")) {
        forget_transaction(s);
    } else if (says(s, "EHLO")) {
        return greet(s, "250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-AUTH PLAIN\r\n250 SMTPUTF8\r\n");
    } else if (says(s, "AUTH PLAIN ")) {
        return reply("235 welcome\r\n");
    } else if (says(s, "HELO")) {
        return greet(s, "250 sink\r\n");
    } else if (says(s, "QUIT")) {
        s->over = true;
        return reply("221 bye\r\n");
    } else if (says(s, "XCOUNT")) {
        return reply("250 mails=%" PRIu64 " connections=%" PRIu64 " most=%" PRIu64 "\r\n", mails, connections, most);
    } else if (!says(s, "NOOP")) {
        return reply("500 unknown command\r\n");
    }
    reply(in_order ? "250 ok\r\n" : "503 bad sequence of commands\r\n");
}

/* Where the content ends, or `end` if it does not yet. */
static const char *read_content(struct session *s, const char *at, const char *end) {
    while (at < end) {
        if (!s->matched) {
            at = memchr(at, END[0], (size_t)(end - at));
            if (!at) return end;
        }
        char byte = *at++;
        s->matched = byte == END[s->matched] ? s->matched + 1 : byte == END[0];
        if (!END[s->matched]) {
            s->in_mail = false;
            forget_transaction(s);
            if (latency)
                enqueue(s);
            else
                accept_mail();
            return at;
        }
    }
    return end;
}

static const char *read_command(struct session *s, const char *at, const char *end) {
    const char *newline = memchr(at, '\n', (size_t)(end - at));
    const char *after = newline ? newline + 1 : end;
    size_t length = (size_t)(after - at), room = LINE - 1 - s->line_length;
    size_t kept = length < room ? length : room; /* of a line too long to be a command its beginning is enough */
    memcpy(s->line + s->line_length, at, kept);
    s->line_length += kept;
    if (newline) {
        s->line[s->line_length] = 0;
        s->line_length = 0;
        on_command(s);
    }
    return after;
}

/* How many of these bytes were dealt with: all, unless the session must wait or its replies fill the output. */
static size_t read_input(struct session *s, size_t length) {
    const char *at = input, *end = input + length;
    while (at < end && !s->waiting && !s->over && output_length < OUTPUT - REPLY)
        at = s->in_mail ? read_content(s, at, end) : read_command(s, at, end);
    return (size_t)(at - input);
}

/* Sessions */

static void open_session(int fd, bool encrypted) {
    int on = 1;
    struct session *s = allocate(sizeof *s);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = s};
    s->fd = fd;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef TLS
    if (encrypted) {
        s->tls = SSL_new(tls);
        if (!s->tls || !SSL_set_fd(s->tls, fd)) fail("SSL_new");
        SSL_set_accept_state(s->tls);
    }
#endif
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
    if (!encrypted) reply(BANNER);
}

static void close_session(struct session *s) {
    if (s->waiting) dequeue(s);
    if (s->greeted) connections--;
#ifdef TLS
    if (s->tls && !s->broken) SSL_shutdown(s->tls); /* says that this is the end */
    SSL_free(s->tls);
    ERR_clear_error();
#endif
    close(s->fd);
    free(s->held);
    free(s->unsent);
    free(s);
}

static void keep_unsent(struct session *s, const char *bytes, size_t length) {
    char *kept = allocate(s->unsent_length + length);
    if (s->unsent) memcpy(kept, s->unsent, s->unsent_length);
    memcpy(kept + s->unsent_length, bytes, length);
    free(s->unsent);
    s->unsent = kept;
    s->unsent_length += length;
}

#ifdef TLS
/* What a call brought: bytes, or 0 if it has to wait or the session is broken. */
static size_t tls_result(struct session *s, int result) {
    if (result > 0) return (size_t)result;
    int error = SSL_get_error(s->tls, result);
    s->broken = error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE;
    ERR_clear_error();
    return 0;
}
#endif

/* How many of these bytes the socket took. */
static size_t send_some(struct session *s, const char *bytes, size_t length) {
#ifdef TLS
    if (s->tls) return tls_result(s, SSL_write(s->tls, bytes, (int)length));
#endif
    ssize_t sent = send(s->fd, bytes, length, MSG_NOSIGNAL);
    if (sent >= 0) return (size_t)sent;
    s->broken = errno != EAGAIN;
    return 0;
}

static void send_output(struct session *s) {
    size_t sent = s->unsent || !output_length ? 0 : send_some(s, output, output_length);
    if (sent < output_length) keep_unsent(s, output + sent, output_length - sent);
    output_length = 0;
}

static void send_unsent(struct session *s) {
    char *old = s->unsent;
    size_t length = s->unsent_length, sent = send_some(s, old, length);
    s->unsent = NULL;
    s->unsent_length = 0;
    if (sent < length) keep_unsent(s, old + sent, length - sent);
    free(old);
}

#ifdef TLS
/* One record; the handshake first, after which the banner goes. */
static size_t receive_encrypted(struct session *s) {
    if (!SSL_is_init_finished(s->tls)) {
        if (!tls_result(s, SSL_accept(s->tls))) {
            s->readable = false;
            return 0;
        }
        reply(BANNER);
        send_output(s);
    }
    size_t length = tls_result(s, SSL_read(s->tls, input, INPUT));
    if (!length) s->readable = false; /* all that was there is read: what comes later is a new event */
    return length;
}
#endif

/* Fill `input`; how many bytes, 0 if there are none now. */
static size_t receive(struct session *s) {
    if (s->held) {
        size_t length = s->held_length;
        memcpy(input, s->held, length);
        free(s->held);
        s->held = NULL;
        return length;
    }
    if (!s->readable) return 0;
#ifdef TLS
    if (s->tls) return receive_encrypted(s);
#endif
    ssize_t length = recv(s->fd, input, INPUT, 0);
    /* A short read has emptied the socket: what comes later is a new event. */
    s->readable = length == INPUT || s->hung_up;
    if (length > 0) return (size_t)length;
    s->readable = false;
    s->broken = length == 0 || errno != EAGAIN;
    return 0;
}

/* Do all that can be done for a session now. */
static void serve(struct session *s) {
    while (!s->waiting && !s->over && !s->broken && !s->unsent) {
        size_t length = receive(s);
        if (!length) break;
        size_t used = read_input(s, length);
        if (used < length) {
            s->held_length = length - used;
            s->held = memcpy(allocate(s->held_length), input + used, s->held_length);
        }
        send_output(s);
    }
    send_output(s);
    if (s->broken || (s->over && !s->unsent)) close_session(s);
}

static void on_event(struct session *s, uint32_t events) {
    if (events & (EPOLLIN | EPOLLRDHUP)) s->readable = true;
    if (events & EPOLLRDHUP) s->hung_up = true;
    if (events & (EPOLLHUP | EPOLLERR)) s->broken = true;
    if (events & EPOLLOUT && s->unsent) send_unsent(s);
    serve(s);
}

static void on_timer(void) {
    uint64_t times;
    int64_t time = now();
    if (read(timer, &times, sizeof times) < 0 && errno != EAGAIN) fail("read");
    while (first && first->due <= time) {
        struct session *s = first;
        dequeue(s);
        accept_mail();
        serve(s);
    }
    if (first) set_timer();
}

static void on_connections(int from) {
    int fd;
    while ((fd = accept4(from, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        open_session(fd, from == tls_listener);
        if (output_length) send(fd, output, output_length, MSG_NOSIGNAL); /* an empty socket takes it */
        output_length = 0;
    }
    if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR) fail("accept4");
}

/* The process */

static void watch(int fd, void *mark) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = mark};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
}

static int listen_at(uint16_t port, unsigned *bound) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    socklen_t length = sizeof address;
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) fail("socket");
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, SOMAXCONN)) fail("listen");
    if (getsockname(fd, (struct sockaddr *)&address, &length)) fail("getsockname");
    *bound = ntohs(address.sin_port);
    return fd;
}

static void start_tls(const char *pem) {
#ifdef TLS
    tls = SSL_CTX_new(TLS_server_method());
    if (!tls || SSL_CTX_use_certificate_chain_file(tls, pem) != 1 ||
        SSL_CTX_use_PrivateKey_file(tls, pem, SSL_FILETYPE_PEM) != 1) {
        ERR_print_errors_fp(stderr);
        exit(1);
    }
    /* What the socket did not take is kept elsewhere and tried again. */
    SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(tls, 1);
#else
    fprintf(stderr, "no TLS for %s: compile with -DTLS -lssl -lcrypto\n", pem);
    exit(2);
#endif
}

static void start(uint16_t port, const char *pem) {
    struct rlimit files;
    unsigned bound, tls_bound = 0;
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    epoll = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (epoll < 0 || timer < 0) fail("epoll_create1");
    listener = listen_at(port, &bound);
    watch(listener, &listener);
    watch(timer, &timer);
    if (pem) {
        start_tls(pem);
        tls_listener = listen_at(0, &tls_bound);
        watch(tls_listener, &tls_listener);
    }
    printf("ports %u %u\n", bound, tls_bound);
    fflush(stdout);
}

int main(int count, char **words) {
    char *port_end = "", *latency_end = "";
    bool counted = count == 3 || count == 4;
    long port = counted ? strtol(words[1], &port_end, 10) : -1;
    double milliseconds = counted ? strtod(words[2], &latency_end) : -1;
    if (*port_end || *latency_end || port < 0 || port > 65535 || !(milliseconds >= 0 && milliseconds < 1e6)) {
        fprintf(stderr, "usage: sink PORT LATENCY_MS [PEM]\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    latency = (int64_t)(milliseconds * 1e6);
    signal(SIGPIPE, SIG_IGN);
    start((uint16_t)port, words[3]);
    for (;;) {
        struct epoll_event events[EVENTS];
        bool rang = false;
        int happened = epoll_wait(epoll, events, EVENTS, -1);
        if (happened < 0 && errno != EINTR) fail("epoll_wait");
        for (int i = 0; i < happened; i++) {
            if (events[i].data.ptr == &listener)
                on_connections(listener);
            else if (events[i].data.ptr == &tls_listener)
                on_connections(tls_listener);
            else if (events[i].data.ptr == &timer)
                rang = true; /* later: it may close a session that has an event here */
            else
                on_event(events[i].data.ptr, events[i].events);
        }
        if (rang) on_timer();
    }
}
