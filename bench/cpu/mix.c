// A mix as in embedded firmware: a state machine over text, a linked list that is searched, reversed and sorted, an integer matrix, and a CRC of it all.
#include "load.h"

#define NODES 256
#define SIDE 24
#define TEXT 512
#define ROUNDS 11000

struct node {
    struct node *next;
    int16_t key;
    int16_t value;
};

static struct node nodes[NODES];
static int32_t left[SIDE][SIDE], right[SIDE][SIDE], product[SIDE][SIDE];
static char text[TEXT];

static uint16_t crc16(uint16_t crc, uint32_t value)
{
    for (int bit = 0; bit < 32; bit++) {
        uint16_t carry = (uint16_t)((value ^ crc) & 1);
        value >>= 1;
        crc >>= 1;
        if (carry)
            crc ^= 0xa001;
    }
    return crc;
}

enum state { START, SIGN, INTEGER, POINT, FRACTION, EXPONENT, POWER, INVALID, STATES };

static enum state next_state(enum state state, char c)
{
    int digit = c >= '0' && c <= '9';
    switch (state) {
    case START: return digit ? INTEGER : c == '+' || c == '-' ? SIGN : c == '.' ? POINT : INVALID;
    case SIGN: return digit ? INTEGER : c == '.' ? POINT : INVALID;
    case INTEGER: return digit ? INTEGER : c == '.' ? FRACTION : c == 'e' ? EXPONENT : INVALID;
    case POINT: return digit ? FRACTION : INVALID;
    case FRACTION: return digit ? FRACTION : c == 'e' ? EXPONENT : INVALID;
    case EXPONENT: return digit || c == '-' ? POWER : INVALID;
    case POWER: return digit ? POWER : INVALID;
    default: return INVALID;
    }
}

static uint16_t scan(uint16_t crc)
{
    uint32_t ended[STATES] = { 0 };
    enum state state = START;
    for (int i = 0; i < TEXT; i++) {
        if (text[i] == ',') {
            ended[state]++;
            state = START;
        } else {
            state = next_state(state, text[i]);
        }
    }
    for (int i = 0; i < STATES; i++)
        crc = crc16(crc, ended[i]);
    return crc;
}

static struct node *reverse(struct node *list)
{
    struct node *done = NULL;
    while (list) {
        struct node *next = list->next;
        list->next = done;
        done = list;
        list = next;
    }
    return done;
}

static struct node *merge_sort(struct node *list, int length)
{
    if (length < 2) {
        list->next = NULL;
        return list;
    }
    struct node *middle = list;
    for (int i = 0; i < length / 2; i++)
        middle = middle->next;
    struct node *high = merge_sort(middle, length - length / 2);
    struct node *low = merge_sort(list, length / 2);
    struct node *head = NULL, **tail = &head;
    while (low && high) {
        struct node **least = low->key <= high->key ? &low : &high;
        *tail = *least;
        *least = (*least)->next;
        tail = &(*tail)->next;
    }
    *tail = low ? low : high;
    return head;
}

uint64_t run_mix(void)
{
    static const char alphabet[] = "0123456789+-.e,,";
    uint64_t seed = 42;
    uint16_t crc = 0xffff;
    for (int i = 0; i < TEXT; i++)
        text[i] = alphabet[next_random(&seed) >> 60];
    for (int i = 0; i < SIDE; i++) {
        for (int j = 0; j < SIDE; j++) {
            left[i][j] = (int32_t)(next_random(&seed) >> 52);
            right[i][j] = (int32_t)(next_random(&seed) >> 52);
        }
    }
    for (int round = 0; round < ROUNDS; round++) {
        struct node *list = NULL;
        for (int i = 0; i < NODES; i++) {
            nodes[i].next = list;
            nodes[i].key = (int16_t)((i * 7919 + round * 31) & 0x3ff);
            nodes[i].value = (int16_t)i;
            list = &nodes[i];
        }
        for (int wanted = 0; wanted < 16; wanted++) {
            struct node *node = list;
            while (node && node->key != wanted * 13)
                node = node->next;
            crc = crc16(crc, node ? (uint32_t)node->value : 0xffff);
            list = reverse(list);
        }
        list = merge_sort(list, NODES);
        crc = crc16(crc, (uint32_t)list->key << 16 | (uint16_t)list->next->value);
        for (int i = 0; i < SIDE / 4; i++) {
            int row = (i * 4 + round) % SIDE;
            for (int j = 0; j < SIDE; j++) {
                int32_t sum = 0;
                for (int k = 0; k < SIDE; k++)
                    sum += left[row][k] * right[k][j];
                product[row][j] = sum;
            }
            left[row][i] ^= product[row][round % SIDE] & 0xff;
        }
        text[round % TEXT] = alphabet[crc >> 12];
        crc = scan(crc);
    }
    return crc;
}
