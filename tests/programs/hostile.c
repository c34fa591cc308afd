// Opens connections from code that is made to harm who reads it, and closes the other side of each.
//
// Compiled by tests/hostile_files.rs, and run as a user without privileges:
//   load FILE...      a connection from leakconn() of each shared library;
//   maps COUNT        so many executable mappings, then forty connections a second, each from other code;
//   perf COUNT FILE   so many processes that connect from code made at run time, whose perf maps are all FILE.
// When it is done it writes a line, and waits until its standard input is closed.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

typedef int Connect(int, const struct sockaddr *, socklen_t);

static struct sockaddr_in at;
static int listener;
static volatile int opened;

static void peer_closes(void) {
    int fd = accept(listener, NULL, NULL);
    if (fd < 0) exit(4);
    close(fd);
}

static void load(const char *file) {
    void *library = dlopen(file, RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(5);
    }
    int (*leakconn)(int) = (int (*)(int))dlsym(library, "leakconn");
    if (!leakconn || leakconn(ntohs(at.sin_port)) < 0) exit(6);
    peer_closes();
    // The next one is mapped, and seen to be, after this one was looked at.
    usleep(100000);
}

static void map(long count) {
    int self = open("/proc/self/exe", O_RDONLY);
    if (self < 0) exit(5);
    // Of one file, each of its first page: they cannot be merged.
    for (long made = 0; made < count; made++)
        if (mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, self, 0) == MAP_FAILED) exit(6);
    close(self);
}

/// Each time from another address, so that it is another stack.
static void connect_from_made_code(void) {
    static unsigned char *page;
    static size_t used;
    size_t room = 1 << 20;
    if (!page) page = mmap(NULL, room, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED || used + 32 > room) exit(5);
    // push %rbp; mov %rsp,%rbp; mov $connect,%rax; call *%rax; pop %rbp; ret.
    unsigned char code[] = {0x55, 0x48, 0x89, 0xe5, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xd0, 0x5d, 0xc3};
    uintptr_t target = (uintptr_t)&connect;
    memcpy(code + 6, &target, sizeof target);
    memcpy(page + used, code, sizeof code);
    Connect *made = (Connect *)(page + used);
    used += 32;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (made(fd, (void *)&at, sizeof at)) exit(4);
    peer_closes();
    opened++;
}

static void ready(void) {
    printf("ready\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    socklen_t length = sizeof at;
    if (argc < 3) return 2;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (void *)&at, length) || listen(listener, 128)) return 2;
    getsockname(listener, (void *)&at, &length);
    char rest[16];
    if (!strcmp(argv[1], "load")) {
        for (int file = 2; file < argc; file++) load(argv[file]);
    } else if (!strcmp(argv[1], "maps")) {
        map(atol(argv[2]));
        ready();
        struct pollfd input = {.fd = 0, .events = POLLIN};
        while (poll(&input, 1, 25) == 0) connect_from_made_code();
        return 0;
    } else if (!strcmp(argv[1], "perf") && argc > 3) {
        for (long made = 0; made < atol(argv[2]); made++) {
            pid_t child = fork();
            if (child < 0) return 7;
            if (child > 0) continue;
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            char own[64];
            snprintf(own, sizeof own, "/tmp/perf-%d.map", getpid());
            if (link(argv[3], own)) _exit(8);
            connect_from_made_code();
            pause();
        }
        sleep(1);
    } else {
        return 2;
    }
    ready();
    while (read(0, rest, sizeof rest) > 0) {}
    return 0;
}
