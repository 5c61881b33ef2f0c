// Loads that are mostly the kernel's work: system calls, page faults, context switches, processes, signals.
#include "load.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CALLS 600000
#define TRANSFERS 300000
#define FAULT_ROUNDS 30
#define FAULT_BYTES (8 << 20)
#define EXCHANGES 20000
#define FORKS 1500
#define SIGNALS 50000

static int zero, null;

uint64_t run_getppid(void)
{
    uint64_t same = 0;
    long parent = syscall(SYS_getppid);
    for (int i = 0; i < CALLS; i++)
        same += syscall(SYS_getppid) == parent;
    return same;
}

void prepare_rw(void)
{
    zero = open("/dev/zero", O_RDONLY);
    null = open("/dev/null", O_WRONLY);
    if (zero < 0 || null < 0)
        die("/dev/zero, /dev/null");
}

uint64_t run_rw(void)
{
    uint64_t moved = 0;
    char byte;
    for (int i = 0; i < TRANSFERS; i++)
        moved += (uint64_t)(read(zero, &byte, 1) + write(null, &byte, 1));
    return moved;
}

// Without huge pages, which hosts and guests differ in.
uint64_t run_faults(void)
{
    uint64_t sum = 0;
    for (int round = 0; round < FAULT_ROUNDS; round++) {
        char *memory = mmap(NULL, FAULT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            die("mmap");
        // Refused where the kernel has no huge pages at all.
        madvise(memory, FAULT_BYTES, MADV_NOHUGEPAGE);
        for (int i = 0; i < FAULT_BYTES; i += 4096) {
            sum += (uint64_t)memory[i] + 1;
            memory[i] = 1;
        }
        munmap(memory, FAULT_BYTES);
    }
    return sum;
}

uint64_t run_switches(void)
{
    int there[2], back[2];
    if (pipe(there) < 0 || pipe(back) < 0)
        die("pipe");
    pid_t child = fork();
    if (child < 0)
        die("fork");
    uint32_t value;
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &value, sizeof value) == sizeof value) {
            value = value * 1664525 + 1013904223;
            if (write(back[1], &value, sizeof value) != sizeof value)
                _exit(1);
        }
        _exit(0);
    }
    value = 1;
    for (int i = 0; i < EXCHANGES; i++) {
        if (write(there[1], &value, sizeof value) != sizeof value || read(back[0], &value, sizeof value) != sizeof value)
            die("pipe");
    }
    close(there[1]);
    waitpid(child, NULL, 0);
    return value;
}

uint64_t run_forks(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < FORKS; i++) {
        pid_t child = fork();
        if (child < 0)
            die("fork");
        if (child == 0)
            _exit(i & 0x7f);
        int status;
        if (waitpid(child, &status, 0) != child)
            die("waitpid");
        sum = fold(sum, (uint64_t)WEXITSTATUS(status));
    }
    return sum;
}

static volatile uint64_t signalled;

static void count_signal(int number)
{
    signalled += (uint64_t)number;
}

uint64_t run_signals(void)
{
    struct sigaction action = { .sa_handler = count_signal };
    if (sigaction(SIGUSR1, &action, NULL) < 0)
        die("sigaction");
    for (int i = 0; i < SIGNALS; i++)
        raise(SIGUSR1);
    return signalled;
}
