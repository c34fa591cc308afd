// Opens connections from several functions and closes the other side of each.
//
// Compiled by tests/stacks.rs. What it does is said by letters, one after the other:
//   a b  open_a(), open_b() connect; t connects in a thread; d, at the bottom of many calls;
//   x y  take_x(), take_y() accept;
//   j    code made at run time connects, and /tmp/perf-PID.map names it; l, half a second later;
//   w    waits for a line on standard input.
// At the end it sleeps a second and exits, with everything still open.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

typedef int Connect(int, const struct sockaddr *, socklen_t);

static struct sockaddr_in at;
static int listener;
/// Keeps calls from being the last thing that a function does.
static volatile int opened;
/// The names of what was made at run time, if anything was.
static char map_path[64];

static int new_socket(void) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0) exit(3);
    return fd;
}

__attribute__((noinline)) static void open_a(void) {
    int fd = new_socket();
    if (connect(fd, (void *)&at, sizeof at)) exit(4); // line of open_a
    opened++;
}

__attribute__((noinline)) static void open_b(void) {
    int fd = new_socket();
    if (connect(fd, (void *)&at, sizeof at)) exit(4); // line of open_b
    // Another number than above, or the compiler makes one function of the two.
    opened += 2;
}

__attribute__((noinline)) static int take_x(void) {
    int fd = accept(listener, NULL, NULL); // line of take_x
    opened++;
    return fd;
}

__attribute__((noinline)) static int take_y(void) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC); // line of take_y
    opened++;
    return fd;
}

static void *in_thread(void *unused) {
    int fd = new_socket();
    if (connect(fd, (void *)&at, sizeof at)) exit(4); // line of in_thread
    opened++;
    return unused;
}

__attribute__((noinline)) static void deep(int left) {
    volatile char room[256];
    room[0] = (char)left;
    if (left == 0) open_a();
    else deep(left - 1);
    opened += room[0];
}

/// A function that calls connect() and returns: push %rbp; mov %rsp,%rbp; mov $connect,%rax; call *%rax;
/// pop %rbp; ret.
static Connect *made(int slot, size_t *size) {
    static unsigned char *page;
    if (!page) {
        page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (page == MAP_FAILED) exit(5);
    }
    unsigned char code[] = {0x55, 0x48, 0x89, 0xe5, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xd0, 0x5d, 0xc3};
    uintptr_t target = (uintptr_t)&connect;
    memcpy(code + 6, &target, sizeof target);
    memcpy(page + slot * 64, code, sizeof code);
    *size = sizeof code;
    return (Connect *)(page + slot * 64);
}

static void name(Connect *function, size_t size, const char *name) {
    snprintf(map_path, sizeof map_path, "/tmp/perf-%d.map", getpid());
    FILE *map = fopen(map_path, "a");
    if (!map) exit(6);
    fprintf(map, "%lx %zx %s\n", (unsigned long)function, size, name);
    fclose(map);
}

__attribute__((noinline)) static void open_made(int slot, const char *called, int late) {
    size_t size;
    Connect *function = made(slot, &size);
    // The file is there from the beginning, as runtimes have it.
    name(function, 0, "nothing");
    if (!late) name(function, size, called);
    if (function(new_socket(), (void *)&at, sizeof at)) exit(4); // line of open_made
    if (late) {
        usleep(500000);
        name(function, size, called);
    }
    opened++;
}

int main(int argc, char **argv) {
    socklen_t length = sizeof at;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (void *)&at, length) || listen(listener, 128)) return 2;
    getsockname(listener, (void *)&at, &length);
    for (const char *todo = argc > 1 ? argv[1] : ""; *todo; todo++) {
        pthread_t thread;
        int fd;
        char line[16];
        switch (*todo) {
        case 'a': open_a(); break;
        case 'b': open_b(); break;
        case 'd': deep(60); break;
        case 'j': open_made(0, "made::at_once here", 0); break;
        case 'l': open_made(1, "made::later", 1); break;
        case 't':
            if (pthread_create(&thread, NULL, in_thread, NULL)) return 2;
            pthread_join(thread, NULL);
            break;
        case 'x':
        case 'y':
            fd = socket(AF_INET, SOCK_STREAM, 0);
            if (connect(fd, (void *)&at, sizeof at)) return 4;
            if ((*todo == 'x' ? take_x() : take_y()) < 0) return 4;
            close(fd);
            continue;
        case 'w':
            printf("waits\n");
            fflush(stdout);
            if (!fgets(line, sizeof line, stdin)) return 2;
            continue;
        default: return 2;
        }
        // The peer closes.
        fd = accept(listener, NULL, NULL);
        if (fd < 0) return 4;
        close(fd);
    }
    sleep(1);
    // What tcptrace has opened, it can still read.
    if (map_path[0]) unlink(map_path);
    return 0;
}
