// What the loads of this program share. A load does a fixed amount of work and returns a checksum of its results, which must be the same wherever it runs.
#ifndef LOAD_H
#define LOAD_H

#include <stdint.h>
#include <stddef.h>

typedef uint64_t load_function(void);

struct load {
    const char *name;
    load_function *run;
    // Makes what the load needs, outside the measured time. May be null.
    void (*prepare)(void);
};

// One step of xorshift64*, the loads' source of data (Marsaglia 2003).
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545f4914f6cdd1dull;
}

// FNV-1a over the eight bytes of a value.
static inline uint64_t fold(uint64_t sum, uint64_t value)
{
    for (int i = 0; i < 8; i++) {
        sum ^= value & 0xff;
        sum *= 0x100000001b3ull;
        value >>= 8;
    }
    return sum;
}

#define FOLD_START 0xcbf29ce484222325ull

// Ends the program with a message that names the failed call.
void die(const char *what) __attribute__((noreturn));

// Memory that is already there when the measuring begins.
void *filled(size_t bytes);

load_function run_mix, run_quicksort, run_sha256, run_matrix, run_hash_small, run_hash_large, run_fib, run_bytes, run_calls;
void prepare_quicksort(void), prepare_sha256(void), prepare_matrix(void), prepare_hash_small(void), prepare_hash_large(void), prepare_bytes(void);

load_function run_getppid, run_rw, run_faults, run_switches, run_forks, run_signals;
void prepare_rw(void);

load_function run_parallel1, run_parallel2, run_futex;

#endif
