// The loads of "bench.sh cpu" that are C programs, and the clock for those that are not.
//
//   load NAME                 runs a load
//   load time NAME COMMAND... runs a command and its children
//   load list                 names the loads
//   load tree FOLDER          makes folders and empty files for a walk
//
// Around the measured time it prints "@BEGIN NAME" and "@END NAME WALL CPU", in seconds; a load then prints "@SUM NAME CHECKSUM".
#include "load.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const struct load loads[] = {
    { "mix", run_mix, NULL },
    { "quicksort", run_quicksort, prepare_quicksort },
    { "sha256-c", run_sha256, prepare_sha256 },
    { "matrix", run_matrix, prepare_matrix },
    { "hash-cache", run_hash_small, prepare_hash_small },
    { "hash-14M", run_hash_large, prepare_hash_large },
    { "fib", run_fib, NULL },
    { "bytes", run_bytes, prepare_bytes },
    { "calls", run_calls, NULL },
    { "getppid", run_getppid, NULL },
    { "read-write-1", run_rw, prepare_rw },
    { "page-faults", run_faults, NULL },
    { "switches", run_switches, NULL },
    { "fork", run_forks, NULL },
    { "signals", run_signals, NULL },
    { "parallel-1", run_parallel1, NULL },
    { "parallel-2", run_parallel2, NULL },
    { "futex", run_futex, NULL },
};

void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

void *filled(size_t bytes)
{
    void *memory = malloc(bytes);
    if (!memory)
        die("malloc");
    memset(memory, 0x5a, bytes);
    return memory;
}

static double wall(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double processor(void)
{
    double total = 0;
    for (int who = 0; who < 2; who++) {
        struct rusage usage;
        getrusage(who ? RUSAGE_CHILDREN : RUSAGE_SELF, &usage);
        total += (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    }
    return total;
}

static double begun_wall, begun_processor;

static void begin(const char *name)
{
    printf("@BEGIN %s\n", name);
    fflush(stdout);
    begun_processor = processor();
    begun_wall = wall();
}

static void end(const char *name)
{
    double used_wall = wall() - begun_wall;
    double used_processor = processor() - begun_processor;
    printf("@END %s %.6f %.6f\n", name, used_wall, used_processor);
    fflush(stdout);
}

static int time_command(const char *name, char **command)
{
    begin(name);
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        execvp(command[0], command);
        die(command[0]);
    }
    int status;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR)
            die("waitpid");
    }
    end(name);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// 40 folders of 10 folders of 12 files.
static void make_tree(const char *folder)
{
    char path[256];
    if (mkdir(folder, 0755) < 0)
        die(folder);
    for (int outer = 0; outer < 40; outer++) {
        snprintf(path, sizeof path, "%s/package-%d", folder, outer);
        if (mkdir(path, 0755) < 0)
            die(path);
        for (int inner = 0; inner < 10; inner++) {
            snprintf(path, sizeof path, "%s/package-%d/module-%d", folder, outer, inner);
            if (mkdir(path, 0755) < 0)
                die(path);
            for (int file = 0; file < 12; file++) {
                snprintf(path, sizeof path, "%s/package-%d/module-%d/source-%d.c", folder, outer, inner, file);
                int descriptor = open(path, O_CREAT | O_WRONLY, 0644);
                if (descriptor < 0)
                    die(path);
                close(descriptor);
            }
        }
    }
}

int main(int count, char **arguments)
{
    const char *name = count > 1 ? arguments[1] : "";
    if (!strcmp(name, "time") && count > 3)
        return time_command(arguments[2], arguments + 3);
    if (!strcmp(name, "tree") && count == 3) {
        make_tree(arguments[2]);
        return 0;
    }
    for (size_t i = 0; i < sizeof loads / sizeof loads[0]; i++) {
        if (!strcmp(name, "list")) {
            puts(loads[i].name);
        } else if (!strcmp(name, loads[i].name)) {
            if (loads[i].prepare)
                loads[i].prepare();
            begin(name);
            uint64_t sum = loads[i].run();
            end(name);
            printf("@SUM %s %016llx\n", name, (unsigned long long)sum);
            return 0;
        }
    }
    if (!strcmp(name, "list"))
        return 0;
    fprintf(stderr, "load: unknown load '%s'\n", name);
    return 2;
}
