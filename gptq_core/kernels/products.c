/* Sums over the tokens of products of bfloat16 inputs, with the instructions that x86 processors have for it (avx512_bf16): see c_loops.py.

   total += left' right. A product of two bfloat16 numbers is exact in float32; the instruction adds those of two tokens to a float32 sum.
   Panels of the operands are packed, two tokens side by side as the instruction takes them, STRETCH pairs of tokens at a time, so
   that what is read again and again stays in the near caches. ROWS by SIDE sums stay in registers over RUN pairs, are added up over the
   stretch and then to the total: one long sum rounds off more. Their order depends on the tokens alone, not on the panel that an entry is
   in: however the work is shared, bits are the same. Of a product of a matrix with itself each panel is laid out once.

   The threads are torch's own, lent by its OpenMP library: threads of ours would wait for a core on which one of those, having had
   work a moment ago, spins until there is more.

   A compiler that does not know the instructions builds nothing of this, and the library has no `add_products`. */

#include <stdint.h>

#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>)

#include <immintrin.h>

#define WITH_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
enum { LANES = 16, VECTORS = SIDE / LANES, ROWS = 8, RUN = 64 }; /* SIDE and STRETCH come from c_loops.py */

static inline long least(long a, long b) { return a < b ? a : b; }

/* packed[pair][SIDE] of at most SIDE columns; zeros where a last token has no partner, and beyond the columns. */
WITH_BFLOAT16 static void pack(const uint16_t *inputs, long stride, long tokens, long columns, uint32_t *packed)
{
    for (long t = 0; t < tokens; t += 2, packed += SIDE) {
        const uint16_t *even = inputs + t * stride;
        if (t + 1 < tokens)
            for (long j = 0; j < columns; j++)
                packed[j] = even[j] | (uint32_t)even[stride + j] << 16;
        else
            for (long j = 0; j < columns; j++)
                packed[j] = even[j];
        for (long j = columns; j < SIDE; j++)
            packed[j] = 0;
    }
}

/* total (rows, columns) += the products of ROWS columns of a packed panel and SIDE of another, so far as total has them. */
WITH_BFLOAT16 static void multiply(
    const uint32_t *left, const uint32_t *right, long pairs, float *total, long stride, long rows, long columns)
{
    float sums[ROWS][SIDE] = {{0}};
    while (pairs) {
        __m512 sum[ROWS][VECTORS];
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECTORS; v++)
                sum[i][v] = _mm512_setzero_ps();
        const long run = least(pairs, RUN);
        for (long k = 0; k < run; k++, left += SIDE, right += SIDE) {
            __m512bh across[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                across[v] = (__m512bh)_mm512_loadu_si512(right + v * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                __m512bh down = (__m512bh)_mm512_set1_epi32((int)left[i]);
#pragma GCC unroll 3
                for (int v = 0; v < VECTORS; v++)
                    sum[i][v] = _mm512_dpbf16_ps(sum[i][v], down, across[v]);
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECTORS; v++)
                _mm512_storeu_ps(sums[i] + v * LANES, _mm512_add_ps(_mm512_loadu_ps(sums[i] + v * LANES), sum[i][v]));
        pairs -= run;
    }
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++)
            total[i * stride + j] += sums[i][j];
}

/* total (rows, columns) += left (tokens, rows)' right (tokens, columns). In column j, rows before `above` + j need not be computed. */
struct product {
    const uint16_t *left, *right;
    float *total;
    long left_stride, right_stride, total_stride, tokens, rows, columns, above;
};

WITH_BFLOAT16 static void add_product(const struct product *of, uint32_t *packed)
{
    const long panel = (long)STRETCH * SIDE, panels = (of->columns + SIDE - 1) / SIDE;
    uint32_t *const room = packed + panels * panel;
    for (long start = 0; start < of->tokens; start += 2 * STRETCH) {
        const long some = least(2 * STRETCH, of->tokens - start), pairs = (some + 1) / 2;
        for (long p = 0; p < panels; p++)
            pack(of->right + start * of->right_stride + p * SIDE, of->right_stride, some, least(SIDE, of->columns - p * SIDE),
                 packed + p * panel);
        for (long i = 0; i < of->rows; i += SIDE) {
            const long high = least(SIDE, of->rows - i);
            const uint32_t *down = room;
            const long same = of->left + i - of->right; /* index of this column on the right, if it is one of those */
            if (of->left_stride == of->right_stride && same >= 0 && same % SIDE == 0 && same + high <= of->columns)
                down = packed + same / SIDE * panel;
            else
                pack(of->left + start * of->left_stride + i, of->left_stride, some, high, room);
            for (long p = 0; p < panels; p++)
                for (long r = 0; r < high; r += ROWS)
                    if (i + r + ROWS > of->above + p * SIDE)
                        multiply(down + r, packed + p * panel, pairs, of->total + (i + r) * of->total_stride + p * SIDE, of->total_stride,
                                 least(ROWS, high - r), least(SIDE, of->columns - p * SIDE));
        }
    }
}

struct work {
    const struct product *products;
    long count, next, arrived, room;
    uint32_t *packed;
};

static void take(void *shared)
{
    struct work *work = shared;
    uint32_t *packed = work->packed + work->room * __atomic_fetch_add(&work->arrived, 1, __ATOMIC_RELAXED);
    for (long i; (i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count;)
        add_product(work->products + i, packed);
}

/* `packed` has room for STRETCH * (columns + 2 * SIDE) numbers a thread, columns of the widest product; `team` is OpenMP's GOMP_parallel,
   which calls a function in each of so many threads, or NULL for one thread. */
void add_products(
    const struct product *products, long count, uint32_t *packed, long room, unsigned threads,
    void (*team)(void (*)(void *), void *, unsigned, unsigned))
{
    struct work work = {products, count, 0, 0, room, packed};
    if (team && threads > 1)
        team(take, &work, threads, 0);
    else
        take(&work);
}

#endif
#endif
