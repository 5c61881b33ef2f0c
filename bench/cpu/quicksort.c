// Quicksort of a million integers (Hoare's partition, median of three, insertion sort for short runs).
#include "load.h"

#define LENGTH 1000000
#define ROUNDS 3

static int32_t *source, *data;

void prepare_quicksort(void)
{
    source = filled(LENGTH * sizeof *source);
    data = filled(LENGTH * sizeof *data);
    uint64_t seed = 7;
    for (int i = 0; i < LENGTH; i++)
        source[i] = (int32_t)(next_random(&seed) >> 32);
}

static void sort(int32_t *first, int32_t *last)
{
    while (last - first > 12) {
        int32_t a = *first, b = first[(last - first) / 2], c = *last;
        int32_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        int32_t *i = first, *j = last;
        while (i <= j) {
            while (*i < pivot)
                i++;
            while (*j > pivot)
                j--;
            if (i <= j) {
                int32_t swapped = *i;
                *i++ = *j;
                *j-- = swapped;
            }
        }
        if (j - first < last - i) {
            sort(first, j);
            first = i;
        } else {
            sort(i, last);
            last = j;
        }
    }
    for (int32_t *i = first + 1; i <= last; i++) {
        int32_t value = *i;
        int32_t *j = i;
        for (; j > first && j[-1] > value; j--)
            *j = j[-1];
        *j = value;
    }
}

uint64_t run_quicksort(void)
{
    uint64_t sum = FOLD_START;
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LENGTH; i++)
            data[i] = source[i] ^ round;
        sort(data, data + LENGTH - 1);
        for (int i = 0; i < LENGTH; i += 997)
            sum = fold(sum, (uint32_t)data[i]);
    }
    return sum;
}
