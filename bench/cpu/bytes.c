// Copies memory a byte at a time and adds it up.
#include "load.h"

#define LENGTH (4 << 20)
#define ROUNDS 120

static uint8_t *from, *to;

void prepare_bytes(void)
{
    uint64_t seed = 13;
    from = filled(LENGTH);
    to = filled(LENGTH);
    for (int i = 0; i < LENGTH; i++)
        from[i] = (uint8_t)(next_random(&seed) >> 56);
}

uint64_t run_bytes(void)
{
    uint64_t sum = 0;
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LENGTH; i++) {
            uint8_t byte = from[i];
            to[i] = byte;
            sum += byte;
        }
        uint8_t *swapped = from;
        from = to;
        to = swapped;
        from[round * 4099] += 1;
    }
    return sum;
}
