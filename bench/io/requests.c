/* The least that can be done for one 4 KiB request: the host's call for a random block, in a loop, one thread. The calls are those that the device
   makes: a read of what the page cache holds (preadv2 with RWF_NOWAIT), or pwrite; and as many buffers as the device's driver has.
   Prints requests a second, and requests a second of processor time. Usage: requests read|write FILE COUNT */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, SLOTS = 85 };
static char buffers[SLOTS][BLOCK] __attribute__((aligned(BLOCK)));

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    int write_them = strcmp(argv[1], "write") == 0;
    int fd = open(argv[2], O_RDWR | O_CLOEXEC);
    long count = atol(argv[3]);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0) {
        perror(argv[2]);
        return 1;
    }
    uint64_t blocks = (uint64_t)status.st_size / BLOCK;
    uint64_t x = 88172645463325252u;
    double start = 0;
    double busy = 0;
    for (long i = -count / 5; i < count; i++) {
        if (i == 0) {
            start = now(CLOCK_MONOTONIC);
            busy = now(CLOCK_THREAD_CPUTIME_ID);
        }
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        off_t offset = (off_t)(x % blocks * BLOCK);
        char *buffer = buffers[(unsigned long)i % SLOTS];
        struct iovec vector = { buffer, BLOCK };
        ssize_t done = write_them ? pwrite(fd, buffer, BLOCK, offset) : syscall(SYS_preadv2, fd, &vector, 1, offset, 0, RWF_NOWAIT);
        /* The host may have dropped the page since. */
        if (done < 0 && errno == EAGAIN)
            done = pread(fd, buffer, BLOCK, offset);
        if (done != BLOCK) {
            perror("request");
            return 1;
        }
    }
    printf("%.0f %.0f\n", (double)count / (now(CLOCK_MONOTONIC) - start), (double)count / (now(CLOCK_THREAD_CPUTIME_ID) - busy));
    return 0;
}
