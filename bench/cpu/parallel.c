// Loads for several processors: the same computing by one and by two threads, and threads that hand locks over by futex.
#include "load.h"

#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STEPS 400000000
#define FUTEX_THREADS 4
#define FUTEX_TURNS 20000

// Arithmetic, a table in the first-level cache and branches that depend on data.
static void *compute(void *argument)
{
    uint64_t *sum = argument;
    uint64_t seed = *sum, total = 0;
    uint16_t table[1024] = { 0 };
    for (int i = 0; i < STEPS / 4; i++) {
        uint64_t x = next_random(&seed);
        uint16_t *entry = &table[x >> 54];
        *entry = (uint16_t)(*entry + x);
        if (*entry & 4)
            total += x >> 7;
        else
            total ^= x;
    }
    *sum = total;
    return NULL;
}

static uint64_t parallel(int threads)
{
    pthread_t thread[2];
    uint64_t sums[2] = { 1, 1 };
    for (int i = 0; i < threads; i++) {
        if (pthread_create(&thread[i], NULL, compute, &sums[i]))
            die("pthread_create");
    }
    for (int i = 0; i < threads; i++)
        pthread_join(thread[i], NULL);
    // Both did the same work: the checksum does not depend on how many there are.
    return threads == 2 && sums[0] != sums[1] ? 0 : sums[0];
}

uint64_t run_parallel1(void)
{
    return parallel(1);
}

uint64_t run_parallel2(void)
{
    return parallel(2);
}

// A mutex of three states (Drepper, "Futexes are tricky", section 5): free, taken, taken with waiters.
static atomic_int lock;
static uint64_t counter;

static void futex(atomic_int *word, int operation, int value)
{
    syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static void take(void)
{
    int seen = 0;
    if (atomic_compare_exchange_strong(&lock, &seen, 1))
        return;
    if (seen != 2)
        seen = atomic_exchange(&lock, 2);
    while (seen != 0) {
        futex(&lock, FUTEX_WAIT, 2);
        seen = atomic_exchange(&lock, 2);
    }
}

static void give(void)
{
    if (atomic_fetch_sub(&lock, 1) != 1) {
        atomic_store(&lock, 0);
        futex(&lock, FUTEX_WAKE, 1);
    }
}

// A ring: thread n may go when turn % threads == n. A lost wake-up stands still for good.
static atomic_int turn;

static void *contend(void *argument)
{
    int self = (int)(intptr_t)argument;
    for (int i = 0; i < FUTEX_TURNS; i++) {
        take();
        uint64_t seen = counter;
        for (int j = 0; j < 20; j++)
            __asm__ volatile("" ::: "memory");
        counter = seen + 1;
        give();
        if (i % 4)
            continue;
        int now;
        while ((now = atomic_load(&turn)) % FUTEX_THREADS != self)
            futex(&turn, FUTEX_WAIT, now);
        atomic_store(&turn, now + 1);
        futex(&turn, FUTEX_WAKE, FUTEX_THREADS);
    }
    return NULL;
}

uint64_t run_futex(void)
{
    pthread_t threads[FUTEX_THREADS];
    for (int i = 0; i < FUTEX_THREADS; i++) {
        if (pthread_create(&threads[i], NULL, contend, (void *)(intptr_t)i))
            die("pthread_create");
    }
    for (int i = 0; i < FUTEX_THREADS; i++)
        pthread_join(threads[i], NULL);
    return counter << 32 | (uint64_t)atomic_load(&turn);
}
