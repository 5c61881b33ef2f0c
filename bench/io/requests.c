/* The least that can be done for one 4 KiB request: pread or pwrite of a random block, in a loop, one thread.
   Prints requests a second. Usage: requests read|write FILE COUNT */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, SLOTS = 85 };
static char buffers[SLOTS][BLOCK] __attribute__((aligned(BLOCK)));

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
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
    for (long i = -count / 5; i < count; i++) {
        if (i == 0)
            start = now();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        off_t offset = (off_t)(x % blocks * BLOCK);
        char *buffer = buffers[(unsigned long)i % SLOTS];
        ssize_t done = write_them ? pwrite(fd, buffer, BLOCK, offset) : pread(fd, buffer, BLOCK, offset);
        if (done != BLOCK) {
            perror("request");
            return 1;
        }
    }
    printf("%.0f\n", (double)count / (now() - start));
    return 0;
}
