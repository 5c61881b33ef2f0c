// Indirect calls through a table, as an interpreter of byte code makes them.
#include "load.h"

#define PROGRAM 4096
#define ROUNDS 8000

struct machine {
    uint64_t a, b;
    uint32_t at;
};

typedef void operation(struct machine *);

static void op_add(struct machine *m) { m->a += m->b; }
static void op_xor(struct machine *m) { m->a ^= m->b << 1; }
static void op_turn(struct machine *m) { m->a = m->a << 7 | m->a >> 57; }
static void op_swap(struct machine *m) { uint64_t a = m->a; m->a = m->b; m->b = a; }
static void op_count(struct machine *m) { m->b += m->at; }
static void op_multiply(struct machine *m) { m->b *= 0x9e3779b97f4a7c15ull; }
static void op_skip(struct machine *m) { m->at += (uint32_t)(m->a & 1); }
static void op_shift(struct machine *m) { m->b ^= m->a >> 3; }

uint64_t run_calls(void)
{
    static operation *const operations[8] = { op_add, op_xor, op_turn, op_swap, op_count, op_multiply, op_skip, op_shift };
    static uint8_t program[PROGRAM];
    uint64_t seed = 17;
    // A program of 64 steps over and over, as a loop's body would be.
    for (int i = 0; i < 64; i++)
        program[i] = (uint8_t)(next_random(&seed) >> 61);
    for (int i = 64; i < PROGRAM; i++)
        program[i] = program[i - 64];
    struct machine m = { 1, 2, 0 };
    for (int round = 0; round < ROUNDS; round++) {
        for (m.at = 0; m.at < PROGRAM; m.at++)
            operations[program[m.at]](&m);
    }
    return fold(fold(FOLD_START, m.a), m.b);
}
