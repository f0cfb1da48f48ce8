/* Callers of message.VarifyService/GetVarifyCode over gRPC. Linux only, one thread.

       grpc_load PORT CALLERS CHANNELS SECONDS COUNT PREFIX

   So many callers on so many connections to 127.0.0.1, each asking again as soon as it is answered: for SECONDS, or
   with SECONDS 0 until COUNT calls were made. Every call is for an address of its own, PREFIX and a number. Prints one
   JSON object: `count`, answers of Success that came in time; `seconds`; `answers` by error code ("none": a call that
   ended without a message); `p50`, `p90`, `p99` of Successes in ms; `cpu`, seconds that this process used.

   A client shares its cores with the server, so this one does what a gRPC client does on the wire and nothing else:
   HTTP/2 frames with indexed header fields, all calls that are due at once in one write. Response headers are not
   decoded: the error is in the message, and a call without one has failed. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHANNELS = 64, CALLERS = 4096, FRAME = 16384, INPUT = 4 * FRAME, OUTPUT = 1 << 20, MESSAGE = 512, ERRORS = 2048 };
enum { DATA = 0, HEADERS = 1, RST_STREAM = 3, SETTINGS = 4, PING = 6, GOAWAY = 7, WINDOW_UPDATE = 8 };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4, PADDED = 8 };
enum { TIMEOUT_MS = 30000 }; /* ms without any answer */

struct channel {
    int fd;
    uint32_t next_stream;
    int64_t window; /* bytes of DATA that the server takes */
    bool greeted;   /* the header fields are in its table */
    size_t input_length, output_length;
    uint8_t input[INPUT], output[OUTPUT];
};

struct caller {
    struct channel *channel;
    uint32_t stream; /* 0: not calling */
    bool stalled;    /* waits for the window */
    int64_t began;   /* ns */
    size_t message_length;
    char address[128];
    uint8_t message[MESSAGE];
};

static struct channel *channels[CHANNELS];
static struct caller callers[CALLERS];
static int caller_count, channel_count, port;
static const char *prefix;
static int64_t began, end;                 /* ns */
static uint64_t asked, wanted, open_calls; /* calls */
static uint64_t in_time, answers[ERRORS], unanswered;
static float *latencies; /* ms */
static size_t latency_count, latency_room;

static void fail(const char *what, const char *which) {
    fprintf(stderr, "grpc_load: %s%s\n", what, which);
    exit(1);
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Frames out */

static uint8_t *room(struct channel *c, size_t length) {
    if (c->output_length + length > OUTPUT) fail("the server does not read", "");
    uint8_t *at = c->output + c->output_length;
    c->output_length += length;
    return at;
}

static void put_frame(struct channel *c, uint8_t type, uint8_t flags, uint32_t stream, const void *body, size_t length) {
    uint8_t *at = room(c, 9 + length);
    uint32_t id = htonl(stream);
    at[0] = 0, at[1] = (uint8_t)(length >> 8), at[2] = (uint8_t)length, at[3] = type, at[4] = flags;
    memcpy(at + 5, &id, 4);
    if (length) memcpy(at + 9, body, length);
}

static uint8_t *put_string(uint8_t *at, const char *text) {
    size_t length = strlen(text); /* below 127: one byte tells it */
    *at++ = (uint8_t)length;
    memcpy(at, text, length);
    return at + length;
}

/* The first call of a channel puts its header fields in the server's table, where the others find them (RFC 7541). */
static size_t header_block(struct channel *c, uint8_t *block) {
    static const uint8_t later[] = {0x83, 0x86, 0xc3, 0xc2, 0xc1, 0xc0, 0xbf, 0xbe};
    uint8_t *at = block;
    char authority[32];
    if (c->greeted) {
        memcpy(block, later, sizeof later);
        return sizeof later;
    }
    c->greeted = true;
    snprintf(authority, sizeof authority, "127.0.0.1:%d", port);
    *at++ = 0x83; /* :method POST */
    *at++ = 0x86; /* :scheme http */
    *at++ = 0x44, at = put_string(at, "/message.VarifyService/GetVarifyCode");
    *at++ = 0x41, at = put_string(at, authority);
    *at++ = 0x5f, at = put_string(at, "application/grpc");
    *at++ = 0x40, at = put_string(put_string(at, "te"), "trailers");
    *at++ = 0x40, at = put_string(put_string(at, "grpc-accept-encoding"), "identity, deflate, gzip");
    *at++ = 0x7a, at = put_string(at, "grpc-load/1.0");
    return (size_t)(at - block);
}

static void put_call(struct caller *caller) {
    struct channel *c = caller->channel;
    size_t length = strlen(caller->address);
    uint8_t block[256], data[7 + sizeof caller->address] = {0, 0, 0, 0, (uint8_t)(length + 2), 0x0a, (uint8_t)length};
    if (c->window < (int64_t)length + 7) {
        caller->stalled = true;
        return;
    }
    caller->stalled = false;
    c->window -= (int64_t)length + 7;
    caller->stream = c->next_stream;
    c->next_stream += 2;
    memcpy(data + 7, caller->address, length);
    put_frame(c, HEADERS, END_HEADERS, caller->stream, block, header_block(c, block));
    put_frame(c, DATA, END_STREAM, caller->stream, data, length + 7);
}

static void ask(struct caller *caller, int64_t time) {
    if (wanted ? asked >= wanted : time >= end) return;
    snprintf(caller->address, sizeof caller->address, "%s%llu@example.com", prefix, (unsigned long long)asked++);
    caller->message_length = 0;
    caller->began = time;
    open_calls++;
    put_call(caller);
}

/* Answers */

static uint64_t varint(const uint8_t **at, const uint8_t *stop) {
    uint64_t value = 0;
    for (int shift = 0; *at < stop && shift < 64; shift += 7) {
        uint8_t byte = *(*at)++;
        value |= (uint64_t)(byte & 127) << shift;
        if (byte < 128) break;
    }
    return value;
}

/* The field `error` of GetVarifyRsp; its field `email` must be the address that was asked for. */
static uint64_t read_error(struct caller *caller) {
    const uint8_t *at = caller->message + 5, *stop = caller->message + caller->message_length;
    uint64_t error = 0;
    bool echoed = false;
    while (at < stop) {
        uint64_t tag = varint(&at, stop), value = varint(&at, stop);
        if (tag == 0x08) error = value;
        if ((tag & 7) != 2) continue;
        if (value > (size_t)(stop - at)) break;
        if (tag == 0x12) echoed = value == strlen(caller->address) && !memcmp(at, caller->address, value);
        at += value;
    }
    if (!echoed) fail("the answer is for another address than ", caller->address);
    return error;
}

static void keep_latency(int64_t nanoseconds) {
    if (latency_count == latency_room) {
        latency_room = latency_room ? 2 * latency_room : 1 << 16;
        latencies = realloc(latencies, latency_room * sizeof *latencies);
        if (!latencies) fail("no memory", "");
    }
    latencies[latency_count++] = (float)nanoseconds / 1e6f;
}

static void on_end(struct caller *caller) {
    int64_t time = now();
    caller->stream = 0;
    open_calls--;
    if (caller->message_length < 5) {
        unanswered++;
    } else {
        uint64_t error = read_error(caller);
        answers[error < ERRORS ? error : ERRORS - 1]++;
        if (!error) {
            keep_latency(time - caller->began);
            in_time += wanted || time <= end;
        }
    }
    ask(caller, time);
}

static struct caller *caller_of(struct channel *c, uint32_t stream) {
    for (int i = 0; stream && i < caller_count; i++)
        if (callers[i].stream == stream && callers[i].channel == c) return &callers[i];
    return NULL;
}

static void on_data(struct caller *caller, const uint8_t *body, size_t length, bool padded) {
    size_t skipped = padded ? 1 : 0, padding = padded && length ? body[0] : 0;
    if (skipped + padding > length) fail("a frame that is no frame", "");
    length -= skipped + padding;
    if (caller->message_length + length > MESSAGE) fail("a message that is too long", "");
    memcpy(caller->message + caller->message_length, body + skipped, length);
    caller->message_length += length;
}

static uint32_t word(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return ntohl(value);
}

static void on_settings(struct channel *c, const uint8_t *body, size_t length) {
    for (size_t i = 0; i + 6 <= length; i += 6) {
        uint32_t value = word(body + i + 2);
        switch (body[i] << 8 | body[i + 1]) {
        case 1: /* HEADER_TABLE_SIZE */
            if (value < 1024) fail("the server keeps too few header fields", "");
            break;
        case 3: /* MAX_CONCURRENT_STREAMS */
            if (value < (uint32_t)(caller_count / channel_count + 1)) fail("more callers than a channel may carry", "");
        }
    }
    put_frame(c, SETTINGS, ACK, 0, NULL, 0);
}

static void on_frame(struct channel *c, const uint8_t *frame, size_t length) {
    uint8_t type = frame[3], flags = frame[4];
    const uint8_t *body = frame + 9;
    uint32_t stream = word(frame + 5) & 0x7fffffff;
    struct caller *caller = caller_of(c, stream);
    if (type == GOAWAY) fail("the server goes away", "");
    if (type == SETTINGS && !(flags & ACK)) on_settings(c, body, length);
    if (type == PING && !(flags & ACK)) put_frame(c, PING, ACK, 0, body, length);
    if (type == WINDOW_UPDATE && !stream && length == 4) {
        c->window += word(body) & 0x7fffffff;
        for (int i = 0; i < caller_count; i++)
            if (callers[i].stalled && callers[i].channel == c) put_call(&callers[i]);
    }
    if (!caller) return;
    if (type == DATA) on_data(caller, body, length, flags & PADDED);
    if (type == RST_STREAM || ((type == DATA || type == HEADERS) && flags & END_STREAM)) on_end(caller);
}

/* Channels */

static void receive(struct channel *c) {
    ssize_t got = recv(c->fd, c->input + c->input_length, INPUT - c->input_length, MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN)) fail("the server closed the connection", "");
    if (got < 0) return;
    c->input_length += (size_t)got;
    size_t at = 0;
    while (c->input_length - at >= 9) {
        const uint8_t *frame = c->input + at;
        size_t length = (size_t)frame[0] << 16 | (size_t)frame[1] << 8 | frame[2];
        if (length > FRAME) fail("a frame that is too long", "");
        if (c->input_length - at < 9 + length) break;
        on_frame(c, frame, length);
        at += 9 + length;
    }
    c->input_length -= at;
    memmove(c->input, c->input + at, c->input_length);
}

static void flush(struct channel *c) {
    if (!c->output_length) return;
    ssize_t sent = send(c->fd, c->output, c->output_length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN) fail("the server closed the connection", "");
    if (sent <= 0) return;
    c->output_length -= (size_t)sent;
    memmove(c->output, c->output + sent, c->output_length);
}

static struct channel *open_channel(void) {
    /* ENABLE_PUSH 0, INITIAL_WINDOW_SIZE 2^31 - 1; and the connection's window as wide, so that it need not be renewed */
    static const uint8_t settings[] = {0, 2, 0, 0, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff};
    static const uint8_t window[] = {0x7f, 0xff, 0, 0};
    static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct channel *c = calloc(1, sizeof *c);
    int on = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (!c) fail("no memory", "");
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    c->next_stream = 1;
    c->window = 65535;
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address)) fail("cannot connect: ", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    memcpy(room(c, sizeof preface - 1), preface, sizeof preface - 1);
    put_frame(c, SETTINGS, 0, 0, settings, sizeof settings);
    put_frame(c, WINDOW_UPDATE, 0, 0, window, sizeof window);
    return c;
}

/* The process */

static int by_size(const void *left, const void *right) {
    float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

static double percentile(int share) {
    size_t rank = (latency_count * (size_t)share + 99) / 100;
    return rank ? latencies[rank - 1] : 0;
}

static void report(double seconds) {
    struct rusage usage;
    const char *comma = "";
    getrusage(RUSAGE_SELF, &usage);
    if (latency_count) qsort(latencies, latency_count, sizeof *latencies, by_size);
    printf("{\"count\": %llu, \"seconds\": %.6f, \"answers\": {", (unsigned long long)in_time, seconds);
    for (int error = 0; error < ERRORS; error++)
        if (answers[error]) {
            printf("%s\"%d\": %llu", comma, error, (unsigned long long)answers[error]);
            comma = ", ";
        }
    if (unanswered) printf("%s\"none\": %llu", comma, (unsigned long long)unanswered);
    printf("}, \"p50\": %.4f, \"p90\": %.4f, \"p99\": %.4f, \"cpu\": %.6f}\n", percentile(50), percentile(90), percentile(99),
           (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
               (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
}

int main(int count, char **words) {
    struct pollfd polled[CHANNELS];
    if (count != 7) fail("usage: grpc_load PORT CALLERS CHANNELS SECONDS COUNT PREFIX", "");
    port = atoi(words[1]);
    caller_count = atoi(words[2]);
    channel_count = atoi(words[3]);
    double seconds = atof(words[4]);
    wanted = strtoull(words[5], NULL, 10);
    prefix = words[6];
    if (caller_count < 1 || caller_count > CALLERS || channel_count < 1 || channel_count > CHANNELS)
        fail("too many callers or channels, or none", "");
    if ((seconds > 0) == (wanted > 0) || strlen(prefix) > 80) fail("SECONDS or COUNT, and a PREFIX of 80 bytes", "");
    for (int i = 0; i < channel_count; i++) {
        channels[i] = open_channel();
        polled[i].fd = channels[i]->fd;
    }
    began = now();
    end = began + (int64_t)(seconds * 1e9);
    for (int i = 0; i < caller_count; i++) {
        callers[i].channel = channels[i % channel_count];
        ask(&callers[i], began);
    }
    while (open_calls) {
        for (int i = 0; i < channel_count; i++) {
            flush(channels[i]);
            polled[i].events = channels[i]->output_length ? POLLIN | POLLOUT : POLLIN;
        }
        if (poll(polled, (nfds_t)channel_count, TIMEOUT_MS) == 0) fail("no answer within 30 s", "");
        for (int i = 0; i < channel_count; i++)
            if (polled[i].revents) receive(channels[i]);
    }
    report(wanted ? (double)(now() - began) / 1e9 : seconds);
    return 0;
}
