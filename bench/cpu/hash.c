// A hash table with open addressing: one that stays in the first-level cache, and one of 14 MB.
#include "load.h"

struct slot {
    uint32_t key;
    uint32_t count;
};

#define SMALL_SLOTS 2048
#define SMALL_KEYS 1400
#define SMALL_OPERATIONS 48000000
#define LARGE_SLOTS (7 << 18)
#define LARGE_KEYS 1200000
#define LARGE_OPERATIONS 5000000

static struct slot *slots;

static void make(size_t count)
{
    slots = filled(count * sizeof *slots);
    for (size_t i = 0; i < count; i++)
        slots[i] = (struct slot){ 0, 0 };
}

void prepare_hash_small(void)
{
    make(SMALL_SLOTS);
}

void prepare_hash_large(void)
{
    make(LARGE_SLOTS);
}

static inline uint64_t count_keys(uint32_t size, uint32_t keys, uint32_t operations)
{
    uint64_t seed = 5, probes = 0;
    for (uint32_t i = 0; i < operations; i++) {
        uint32_t key = (uint32_t)((next_random(&seed) >> 32) * keys >> 32) + 1;
        uint32_t at = (uint32_t)((uint64_t)(key * 2654435761u) * size >> 32);
        while (slots[at].key != key && slots[at].key != 0) {
            at = at + 1 == size ? 0 : at + 1;
            probes++;
        }
        slots[at].key = key;
        slots[at].count++;
    }
    uint64_t sum = fold(FOLD_START, probes);
    for (uint32_t i = 0; i < size; i += 17)
        sum = fold(sum, (uint64_t)slots[i].key << 32 | slots[i].count);
    return sum;
}

uint64_t run_hash_small(void)
{
    return count_keys(SMALL_SLOTS, SMALL_KEYS, SMALL_OPERATIONS);
}

uint64_t run_hash_large(void)
{
    return count_keys(LARGE_SLOTS, LARGE_KEYS, LARGE_OPERATIONS);
}
