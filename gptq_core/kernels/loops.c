/* The three innermost loops for processors: see compiled.py, which builds and calls them.

   Tensors are transposed: a row holds one column of the layer for all outputs, and a stride is the way from one row to the next.
   Outputs do not depend on each other. They go through in tiles that fit into registers, `width` of them; all but the last tile of a
   layer are WIDTH wide, which the compiler knows and unrolls for. */

#include <stdint.h>

enum { WIDTH = 64, NARROW = 32, LARGEST_BLOCK = 128 };

#define INLINE static inline __attribute__((always_inline))
#define EACH_OUTPUT for (long r = 0; r < width; r++)

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
    float left[LARGEST_BLOCK][WIDTH]; /* what is `now` at the end, close together: rows of it are far apart, and evict each other */
    for (long i = 0; i < block; i++) {
        const float *scale = scales + group[i] * grid_stride, *zero = zeros + group[i] * grid_stride;
        const float *share = feedback + i * block;
        float *row = now + i * now_stride;
        uint8_t *code = codes + i * codes_stride;
        float target[WIDTH];
        EACH_OUTPUT target[r] = row[r];
        for (long k = 0; k < i; k++)
            EACH_OUTPUT target[r] -= share[k] * left[k][r];
        EACH_OUTPUT {
            float centred = nearest(target[r] / scale[r], -zero[r], max_code - zero[r]);
            left[i][r] = target[r] - centred * scale[r];
            row[r] = left[i][r];
            code[r] = (uint8_t)(int)(centred + zero[r]);
        }
    }
}

/* columns.round_columns for at most LARGEST_BLOCK columns; feedback is (block, block) and transposed, row i what column i takes over. */
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

INLINE void settle_column(
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

/* columns.settle; target and codes are whole layers, `here` the rows of theirs that the block's columns have. errors may be 0. */
void settle(
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
            settle_column(1, found + i * out, left_row, target_row, scale, zero, diagonal[i], codes + whole, delta + back, error, loss, out);
        else
            settle_column(0, found + i * out, left_row, target_row, scale, zero, diagonal[i], codes + whole, delta + back, error, loss, out);
    }
}

INLINE void descend_tile(
    long width, uint8_t *codes, long codes_stride, float *slope, long slope_stride, const float *scale, const float *zero,
    float max_code, const float *damped, long damped_stride, float *change, long change_stride, long block)
{
    float moved[LARGEST_BLOCK][WIDTH];
    for (long i = 0; i < block; i++) {
        const float *bend = damped + i * damped_stride;
        const float inverse = 1 / bend[i];
        float *row = slope + i * slope_stride;
        uint8_t *code = codes + i * codes_stride;
        float found[WIDTH];
        EACH_OUTPUT found[r] = row[r];
        for (long k = 0; k < i; k++)
            EACH_OUTPUT found[r] += bend[k] * moved[k][r];
        EACH_OUTPUT {
            float before = ((float)code[r] - zero[r]) * scale[r];
            float centred = nearest((before - found[r] * inverse) / scale[r], -zero[r], max_code - zero[r]);
            moved[i][r] = centred * scale[r] - before;
            change[i * change_stride + r] = moved[i][r];
            row[r] = found[r];
            code[r] = (uint8_t)(int)(centred + zero[r]);
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

INLINE void errors_tile(
    long width, const float *weights, long stride, const float *importance, const float *scales, const float *zeros,
    float max_code, float *errors, long columns, long candidates, long out)
{
    for (long c = 0; c < candidates; c++) {
        float scale[NARROW], inverse[NARROW], lowest[NARROW], highest[NARROW], error[NARROW];
        EACH_OUTPUT {
            scale[r] = scales[c * out + r];
            inverse[r] = 1 / scale[r];
            lowest[r] = -zeros[c * out + r];
            highest[r] = max_code + lowest[r];
            error[r] = 0;
        }
        for (long i = 0; i < columns; i++)
            EACH_OUTPUT {
                float weight = weights[i * stride + r];
                float off = weight - nearest(weight * inverse[r], lowest[r], highest[r]) * scale[r];
                error[r] += importance[i] * (off * off);
            }
        EACH_OUTPUT errors[c * out + r] = error[r];
    }
}

/* scales.errors of one group: weights (columns, out); scales, zeros and errors (candidates, out). */
void errors(
    const float *weights, long stride, const float *importance, const float *scales, const float *zeros,
    float max_code, float *errors, long columns, long candidates, long out)
{
    for (long r = 0; r < out; r += NARROW) {
        if (out - r >= NARROW)
            errors_tile(NARROW, weights + r, stride, importance, scales + r, zeros + r, max_code, errors + r, columns, candidates, out);
        else
            errors_tile(out - r, weights + r, stride, importance, scales + r, zeros + r, max_code, errors + r, columns, candidates, out);
    }
}
