/* The innermost loops for processors: see c_loops.py, which builds and calls them.

   Tensors are transposed: a row holds one column of the layer for all outputs, and a stride is the way from one row to the next.
   Outputs do not depend on each other. They go through in tiles that fit into registers, `width` of them; all but the last tile of a
   layer are WIDTH wide, which the compiler knows and unrolls for. */

#include <math.h>
#include <stdint.h>

enum { WIDTH = 64, NARROW = 32 }; /* LARGEST_BLOCK comes from c_loops.py */

#define INLINE static inline __attribute__((always_inline))
#define EACH_OUTPUT for (long r = 0; r < width; r++)

/* Floats in a vector of this processor, and the part of the tile and the number of columns whose sums it keeps in registers. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 }; /* a vector wider than the processor's goes through memory: a tenth of the speed */
#endif
enum { VECTORS = 2, TOGETHER = 4 };
typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

/* sums[j][r] += sign * (shares[j][0] done[0][r] + shares[j][1] done[1][r] + ... of so many), for TOGETHER columns j. */
INLINE void add_up(float (*sums)[WIDTH], float sign, const float *const *shares, float (*done)[WIDTH], long count)
{
    for (long r = 0; r < WIDTH; r += VECTORS * LANES) {
        vector sum[TOGETHER][VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < TOGETHER; j++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
                sum[j][v] = *(const vector *)(sums[j] + r + v * LANES);
        for (long k = 0; k < count; k++)
#pragma GCC unroll 4
            for (int j = 0; j < TOGETHER; j++)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++)
                    sum[j][v] += sign * shares[j][k] * *(const vector *)(done[k] + r + v * LANES);
#pragma GCC unroll 4
        for (int j = 0; j < TOGETHER; j++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++)
                *(vector *)(sums[j] + r + v * LANES) = sum[j][v];
    }
}

/* For i = first + j, j below `count`: sums[j] = rows[i] + sign * (shares[i][0] done[0] + ... of the `first` columns before).
   `count` is TOGETHER but at the end of a block; sums beyond it are of no use. */
INLINE void sum_rows(
    long width, const float *rows, long rows_stride, float sign, const float *shares, long shares_stride, float (*done)[WIDTH],
    long first, long count, float (*sums)[WIDTH])
{
    const float *own[TOGETHER];
    for (long j = 0; j < TOGETHER; j++)
        own[j] = shares + (first + (j < count ? j : 0)) * shares_stride;
    for (long j = 0; j < count; j++)
        EACH_OUTPUT sums[j][r] = rows[(first + j) * rows_stride + r];
    add_up(sums, sign, own, done, first);
}

/* Added, it leaves a float below 2^22 no bits behind the point. No compiler may fold the two additions but with -ffast-math. */
static const float TO_WHOLE = 12582912.0f; /* 1.5 * 2^23 */

/* The code nearest to `steps` less the zero, halves to even; `lowest` and `highest` are whole. */
INLINE float nearest(float steps, float lowest, float highest)
{
    steps = steps < lowest ? lowest : steps;
    steps = steps > highest ? highest : steps;
    return (steps + TO_WHOLE) - TO_WHOLE;
}

INLINE void round_tile(
    long width, float *now, long now_stride, const float *feedback, const float *scales, const float *zeros, long grid_stride,
    const int64_t *group, float max_code, uint8_t *codes, long codes_stride, long block)
{
    float left[LARGEST_BLOCK][WIDTH]; /* `now` as it will be, contiguous: rows of `now` are far apart in memory and evict each other from the cache */
    for (long first = 0; first < block; first += TOGETHER) {
        const long count = block - first < TOGETHER ? block - first : TOGETHER;
        float targets[TOGETHER][WIDTH] = {{0}};
        sum_rows(width, now, now_stride, -1, feedback, block, left, first, count, targets);
        for (long j = 0; j < count; j++) {
            const long i = first + j;
            const float *scale = scales + group[i] * grid_stride, *zero = zeros + group[i] * grid_stride;
            const float *share = feedback + i * block;
            float *target = targets[j], *row = now + i * now_stride;
            uint8_t *code = codes + i * codes_stride;
            for (long k = first; k < i; k++)
                EACH_OUTPUT target[r] -= share[k] * left[k][r];
            EACH_OUTPUT {
                float centred = nearest(target[r] / scale[r], -zero[r], max_code - zero[r]);
                left[i][r] = target[r] - centred * scale[r];
                row[r] = left[i][r];
                code[r] = (uint8_t)(int)(centred + zero[r]);
            }
            for (long r = width; r < WIDTH; r++)
                left[i][r] = 0;
        }
    }
}

/* rounding.round_columns for at most LARGEST_BLOCK columns; feedback is (block, block) and transposed, row i what column i takes over. */
void round_columns(
    float *now, long now_stride, const float *feedback, const float *scales, const float *zeros, long grid_stride,
    const int64_t *group, float max_code, uint8_t *codes, long codes_stride, long block, long out)
{
    for (long r = 0; r < out; r += WIDTH) {
        if (out - r >= WIDTH)
            round_tile(WIDTH, now + r, now_stride, feedback, scales + r, zeros + r, grid_stride, group, max_code, codes + r, codes_stride, block);
        else
            round_tile(out - r, now + r, now_stride, feedback, scales + r, zeros + r, grid_stride, group, max_code, codes + r, codes_stride, block);
    }
}

/* Nearest bfloat16, halves to even, of a finite number; its bits. */
INLINE uint16_t brief(float value)
{
    union { float number; uint32_t bits; } as = { value };
    return (uint16_t)((as.bits + 0x7fff + ((as.bits >> 16) & 1)) >> 16);
}

INLINE void write_back_column(
    int in_bfloat16, const uint8_t *found, const float *left, const float *target, const float *scale, const float *zero, float diagonal,
    uint8_t *codes, void *delta, void *errors, float *loss, long width)
{
    EACH_OUTPUT {
        float change = target[r] - ((float)found[r] - zero[r]) * scale[r], error = left[r] * diagonal;
        codes[r] = found[r];
        loss[r] += error * error;
        if (in_bfloat16) ((uint16_t *)delta)[r] = brief(change);
        else ((float *)delta)[r] = change;
        if (errors && in_bfloat16) ((uint16_t *)errors)[r] = brief(error);
        else if (errors) ((float *)errors)[r] = error;
    }
}

/* rounding.write_back; target and codes are whole layers, `here` the rows of theirs that the block's columns have. errors may be 0. */
void write_back(
    int in_bfloat16, const uint8_t *found, const float *left, const float *target, const int64_t *here, const float *scales,
    const float *zeros, const int64_t *group, const float *diagonal, uint8_t *codes, char *delta, char *errors, float *loss,
    long block, long out)
{
    const long row_bytes = out * (in_bfloat16 ? 2 : 4);
    for (long i = 0; i < block; i++) {
        const long whole = here[i] * out, own = group[i] * out, back = (block - 1 - i) * row_bytes;
        const float *left_row = left + i * out, *target_row = target + whole, *scale = scales + own, *zero = zeros + own;
        char *error = errors ? errors + back : 0;
        if (in_bfloat16)
            write_back_column(1, found + i * out, left_row, target_row, scale, zero, diagonal[i], codes + whole, delta + back, error, loss, out);
        else
            write_back_column(0, found + i * out, left_row, target_row, scale, zero, diagonal[i], codes + whole, delta + back, error, loss, out);
    }
}

INLINE void descend_tile(
    long width, uint8_t *codes, long codes_stride, float *slope, long slope_stride, const float *scale, const float *zero,
    float max_code, const float *damped, long damped_stride, float *change, long change_stride, long block)
{
    float moved[LARGEST_BLOCK][WIDTH];
    for (long first = 0; first < block; first += TOGETHER) {
        const long count = block - first < TOGETHER ? block - first : TOGETHER;
        float slopes[TOGETHER][WIDTH] = {{0}};
        sum_rows(width, slope, slope_stride, 1, damped, damped_stride, moved, first, count, slopes);
        for (long j = 0; j < count; j++) {
            const long i = first + j;
            const float *bend = damped + i * damped_stride;
            const float inverse = 1 / bend[i];
            float *found = slopes[j], *row = slope + i * slope_stride;
            uint8_t *code = codes + i * codes_stride;
            for (long k = first; k < i; k++)
                EACH_OUTPUT found[r] += bend[k] * moved[k][r];
            EACH_OUTPUT {
                float before = ((float)code[r] - zero[r]) * scale[r];
                float centred = nearest((before - found[r] * inverse) / scale[r], -zero[r], max_code - zero[r]);
                moved[i][r] = centred * scale[r] - before;
                change[i * change_stride + r] = moved[i][r];
                row[r] = found[r];
                code[r] = (uint8_t)(int)(centred + zero[r]);
            }
            for (long r = width; r < WIDTH; r++)
                moved[i][r] = 0;
        }
    }
}

/* descent.descend_columns for at most LARGEST_BLOCK columns. */
void descend_columns(
    uint8_t *codes, long codes_stride, float *slope, long slope_stride, const float *scale, const float *zero,
    float max_code, const float *damped, long damped_stride, float *change, long change_stride, long block, long out)
{
    for (long r = 0; r < out; r += WIDTH) {
        if (out - r >= WIDTH)
            descend_tile(WIDTH, codes + r, codes_stride, slope + r, slope_stride, scale + r, zero + r,
                         max_code, damped, damped_stride, change + r, change_stride, block);
        else
            descend_tile(out - r, codes + r, codes_stride, slope + r, slope_stride, scale + r, zero + r,
                         max_code, damped, damped_stride, change + r, change_stride, block);
    }
}

/* scale_search.float16_exact: as float16 will hold it, never 0. */
INLINE float float16_exact(float scale)
{
    const float smallest = 0x1p-24f, smallest_normal = 0x1p-14f, largest = 65504.0f, to_steps = 0.75f; /* whose last bit is 2^-24 */
    union { float number; uint32_t bits; } as = { fabsf(scale) };
    float magnitude = as.number == 0 ? 1 : as.number < smallest ? smallest : as.number;
    as.number = magnitude;
    as.bits = (as.bits + 0xfff + ((as.bits >> 13) & 1)) & ~(uint32_t)0x1fff; /* 11 bits, halves to even */
    float rounded = magnitude < smallest_normal ? (magnitude + to_steps) - to_steps : as.number;
    return copysignf(rounded > largest ? INFINITY : rounded, scale);
}

INLINE void search_tile(
    long width, const float *weights, long stride, const float *importance, long columns, int symmetric, float smallest_zero,
    float max_code, const float *shares, const float *shifts, long coarse, const float *offsets, long fine, float *scales, float *zeros)
{
    float low[NARROW], high[NARROW], base[NARROW], middle[NARROW], best[NARROW], chosen[NARROW], centre[NARROW], found[NARROW], around[NARROW];
    EACH_OUTPUT low[r] = high[r] = weights[r];
    for (long i = 1; i < columns; i++)
        EACH_OUTPUT {
            float weight = weights[i * stride + r];
            low[r] = weight < low[r] ? weight : low[r];
            high[r] = weight > high[r] ? weight : high[r];
        }
    EACH_OUTPUT {
        if (!symmetric) {
            low[r] = low[r] > 0 ? 0 : low[r];
            high[r] = high[r] < 0 ? 0 : high[r];
        }
        base[r] = symmetric ? (-low[r] > high[r] ? -low[r] : high[r]) / ((max_code + 1) / 2) : (high[r] - low[r]) / max_code;
        middle[r] = symmetric ? 0 : (high[r] + low[r]) / 2;
        best[r] = INFINITY;
        chosen[r] = NAN; /* remains so if no error is a number */
        found[r] = 1;
        centre[r] = 0;
    }
    for (long c = 0; c < coarse + fine; c++) {
        float share[NARROW], scale[NARROW], inverse[NARROW], zero[NARROW], lowest[NARROW], highest[NARROW], error[NARROW];
        if (c == coarse)
            EACH_OUTPUT around[r] = found[r];
        EACH_OUTPUT {
            share[r] = c < coarse ? shares[c] : copysignf(fabsf(around[r]) + offsets[c - coarse], around[r]);
            scale[r] = float16_exact(share[r] * base[r]);
            inverse[r] = 1 / scale[r];
            zero[r] = (max_code + 1) / 2;
            if (!symmetric) { /* the middle of the range falls on the middle of the codes */
                zero[r] = nearest(max_code / 2 - middle[r] / scale[r], -2 * max_code, 2 * max_code) + (c < coarse ? shifts[c] : 0);
                zero[r] = zero[r] < smallest_zero ? smallest_zero : zero[r] > max_code ? max_code : zero[r];
            }
            lowest[r] = -zero[r];
            highest[r] = max_code - zero[r];
            error[r] = 0;
        }
        for (long i = 0; i < columns; i++)
            EACH_OUTPUT {
                float weight = weights[i * stride + r];
                float off = weight - nearest(weight * inverse[r], lowest[r], highest[r]) * scale[r];
                error[r] += importance[i] * (off * off);
            }
        EACH_OUTPUT { /* the first of equals */
            int better = error[r] < best[r];
            best[r] = better ? error[r] : best[r];
            chosen[r] = better ? scale[r] : chosen[r];
            centre[r] = better ? zero[r] : centre[r];
            found[r] = better ? share[r] : found[r];
        }
    }
    EACH_OUTPUT {
        scales[r] = chosen[r];
        zeros[r] = centre[r];
    }
}

/* scale_search.search of one group: weights (columns, out). Candidates are `coarse` pairs of shares and shifts, then, around the best of
   those, `fine` offsets of its share. */
void search(
    const float *weights, long stride, const float *importance, long columns, long out, int symmetric, float smallest_zero,
    float max_code, const float *shares, const float *shifts, long coarse, const float *offsets, long fine, float *scales, float *zeros)
{
    for (long r = 0; r < out; r += NARROW) {
        if (out - r < NARROW)
            search_tile(out - r, weights + r, stride, importance, columns, symmetric, smallest_zero, max_code, shares, shifts, coarse,
                        offsets, fine, scales + r, zeros + r);
        else if (symmetric)
            search_tile(NARROW, weights + r, stride, importance, columns, 1, 0, max_code, shares, shifts, coarse,
                        offsets, fine, scales + r, zeros + r);
        else
            search_tile(NARROW, weights + r, stride, importance, columns, 0, smallest_zero, max_code, shares, shifts, coarse,
                        offsets, fine, scales + r, zeros + r);
    }
}

/* checkpoint.packing.pack: codes (units * 32, out), of `bits` bits, to words (units * bits, out). */
void pack(const uint8_t *codes, long units, long out, int bits, uint32_t *words)
{
    for (long u = 0; u < units; u++, codes += 32 * out, words += bits * out)
        for (long first = 0; first < out; first += WIDTH) {
            const long width = out - first < WIDTH ? out - first : WIDTH;
            uint32_t stream[8][WIDTH] = {{0}};
            for (int i = 0; i < 32; i++) {
                const int word = i * bits / 32, shift = i * bits % 32, held = 32 - shift;
                const uint8_t *code = codes + i * out + first;
                EACH_OUTPUT stream[word][r] |= (uint32_t)code[r] << shift;
                if (held < bits)
                    EACH_OUTPUT stream[word + 1][r] |= (uint32_t)code[r] >> held;
            }
            for (int word = 0; word < bits; word++)
                EACH_OUTPUT words[word * out + first + r] = stream[word][r];
        }
}
