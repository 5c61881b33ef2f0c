// Calls and returns: Fibonacci's numbers by the definition.
#include "load.h"

// Not inlined into itself, so that each number is one call.
__attribute__((noinline, noipa, optimize("no-optimize-sibling-calls"))) static uint32_t fib(uint32_t n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

uint64_t run_fib(void)
{
    uint64_t sum = FOLD_START;
    for (uint32_t n = 30; n < 38; n++)
        sum = fold(sum, fib(n));
    return sum;
}
