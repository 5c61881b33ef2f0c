// Multiplies matrices of doubles, one product at a time (scalar SSE2: this program is built without vectorization).
#include "load.h"

#include <string.h>

#define SIDE 256
#define ROUNDS 14

static double *left, *right, *product;

void prepare_matrix(void)
{
    uint64_t seed = 3;
    left = filled(SIDE * SIDE * sizeof *left);
    right = filled(SIDE * SIDE * sizeof *right);
    product = filled(SIDE * SIDE * sizeof *product);
    for (int i = 0; i < SIDE * SIDE; i++) {
        left[i] = (double)(next_random(&seed) >> 40) / 16777216.0 - 0.5;
        right[i] = (double)(next_random(&seed) >> 40) / 16777216.0 - 0.5;
    }
}

uint64_t run_matrix(void)
{
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < SIDE; i++) {
            double *row = product + i * SIDE;
            for (int j = 0; j < SIDE; j++)
                row[j] = 0;
            for (int k = 0; k < SIDE; k++) {
                double factor = left[i * SIDE + k];
                for (int j = 0; j < SIDE; j++)
                    row[j] += factor * right[k * SIDE + j];
            }
        }
        left[round] = product[round * SIDE + round];
    }
    uint64_t sum = FOLD_START;
    for (int i = 0; i < SIDE * SIDE; i += 61) {
        uint64_t bits;
        memcpy(&bits, product + i, sizeof bits);
        sum = fold(sum, bits);
    }
    return sum;
}
