/* What busybox has no program for. "exercise connections ADDRESS PORT COUNT" opens that many TCP connections, holds all of them at once, sends a number on each and
   waits for it to come back. "exercise file PATH ROUNDS" writes, cuts, maps, reads and reopens a file at random and compares it with a copy in memory. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define LARGEST (1 << 20)

static unsigned char model[LARGEST], other[LARGEST];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void all(int descriptor, void *bytes, size_t length, int sends)
{
    for (size_t done = 0; done < length;) {
        ssize_t part = sends ? write(descriptor, (char *)bytes + done, length - done) : read(descriptor, (char *)bytes + done, length - done);
        if (part <= 0)
            fail(sends ? "write" : "read");
        done += part;
    }
}

static int connections(const char *address, int port, int count)
{
    struct rlimit limit = { count + 64, count + 64 };
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
    int *sockets = calloc(count, sizeof(int));
    if (setrlimit(RLIMIT_NOFILE, &limit) || inet_pton(AF_INET, address, &to.sin_addr) != 1)
        fail("set-up");
    for (int i = 0; i < count; i++) {
        sockets[i] = socket(AF_INET, SOCK_STREAM, 0);
        if (sockets[i] < 0 || connect(sockets[i], (struct sockaddr *)&to, sizeof to))
            fail("connect");
    }
    for (uint32_t i = 0; i < (uint32_t)count; i++)
        all(sockets[i], &i, sizeof i, 1);
    for (uint32_t i = 0; i < (uint32_t)count; i++) {
        uint32_t back;
        all(sockets[i], &back, sizeof back, 0);
        if (back != i) {
            printf("connection %u answered %u\n", i, back);
            return 1;
        }
    }
    printf("%d connections\n", count);
    return 0;
}

static int file(const char *path, int rounds)
{
    size_t size = 0;
    int descriptor = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    srandom(42);
    for (int round = 0; round < rounds; round++) {
        size_t at = random() % (size + 4096 < LARGEST ? size + 4096 : LARGEST), length = random() % 40000;
        if (at + length > LARGEST)
            length = LARGEST - at;
        if (descriptor < 0)
            fail(path);
        switch (random() % 6) {
        case 0:
        case 1:
            for (size_t i = 0; i < length; i++)
                model[at + i] = random();
            if (pwrite(descriptor, model + at, length, at) != (ssize_t)length)
                fail("pwrite");
            if (length && at + length > size)
                size = at + length;
            break;
        case 2:
            if (ftruncate(descriptor, at))
                fail("ftruncate");
            if (at < size)
                memset(model + at, 0, size - at);
            size = at;
            break;
        case 3:
            if (size) {
                /* A page that is mapped and written shows in the file, and the other way round. */
                unsigned char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
                if (map == MAP_FAILED)
                    fail("mmap");
                if (memcmp(map, model, size)) {
                    printf("round %d: the map differs\n", round);
                    return 1;
                }
                map[at % size] = model[at % size] = random();
                if (msync(map, size, MS_SYNC) || munmap(map, size))
                    fail("msync");
            }
            break;
        case 4:
            close(descriptor);
            descriptor = open(path, O_RDWR);
            break;
        default:
            if (fsync(descriptor))
                fail("fsync");
        }
        struct stat status;
        if (fstat(descriptor, &status) || (size_t)status.st_size != size || pread(descriptor, other, LARGEST, 0) != (ssize_t)size || memcmp(other, model, size)) {
            printf("round %d: the file differs, size %zu\n", round, size);
            return 1;
        }
    }
    printf("%d rounds\n", rounds);
    return 0;
}

int main(int count, char **words)
{
    if (count == 5 && !strcmp(words[1], "connections"))
        return connections(words[2], atoi(words[3]), atoi(words[4]));
    if (count == 4 && !strcmp(words[1], "file"))
        return file(words[2], atoi(words[3]));
    return 2;
}
