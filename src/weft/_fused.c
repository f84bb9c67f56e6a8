/* The inner loops of merging and folding: what numpy does in a dozen passes over a block, in one or two.
 *
 * Optional: weft/_fused.py has the same in numpy, bit for bit, and says what each function means; it is used where this
 * file was not compiled. Only single IEEE operations in a fixed order (compiled without contraction to fused
 * multiply-add), so the bits are the same on every machine. Stored values are bfloat16 or float32, little-endian.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_CPU
#endif
#define PUBLIC __attribute__((visibility("default"))) /* gcc and clang; elsewhere this does not compile, and numpy does the work */

#define CHUNK 1024 /* entries that stay in the first cache while several loops go over them */
#define PIECE 32768 /* entries that stay in the second cache between reading and writing */
#define LANES 16   /* partial sums, so that adding up in a fixed order can still use wide registers */

typedef float Lanes __attribute__((vector_size(LANES * 4)));

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

#define WIDE16(stored) ((uint32_t)(stored) << 16)
#define WIDE32(stored) ((uint32_t)(stored))
#define ROUND16(bits) ((bits) + 0x7fffu + (((bits) >> 16) & 1u)) /* nearest even; a bfloat16 NaN stays what it is */
#define ROUND32(bits) (bits)

#define GOLDEN 0x9E3779B97F4A7C15u

/* How several increments become one: see Combination in _fused.py. Each row has one number for each model. */
enum { NO_ELECTION, BY_MASS, BY_COUNT };

typedef struct {
    int n, elect, zero_is_plus, all; /* all: no entry is too small or too large */
    const float *least, *most, *votes, *factors, *shares;
    const uint64_t *keys; /* sequences of random numbers, or none */
    uint32_t dropped;
} Rule;

typedef struct {
    uint32_t largest; /* bits of the largest |increment| */
    int64_t balance;  /* entries at which plus won the election, less those at which minus did */
} Seen;

static Rule rule_of(int n, const float *numbers, const uint64_t *keys, uint32_t dropped, int elect, int zero_is_plus) {
    int all = 1;
    for (int k = 0; k < n; k++) all &= numbers[k] == 0.0f && bits_of(numbers[n + k]) == 0x7f800000u;
    Rule rule = {n, elect, zero_is_plus, all, numbers, numbers + n, numbers + 2 * n, numbers + 3 * n, numbers + 4 * n, keys, dropped};
    return rule;
}

/* tau = model - base where least <= |tau| <= most, else 0; returns the bits of the largest |model - base| */
#define DIFFERENCE(NAME, TYPE, WIDE)                                                                                                       \
    EACH_CPU static uint32_t NAME(const TYPE *restrict base, const TYPE *restrict model, float least, float most, float *restrict tau, size_t count) { \
        uint32_t largest = 0, low = bits_of(least), high = bits_of(most);                                                                  \
        for (size_t i = 0; i < count; i++) {                                                                                               \
            uint32_t bits = bits_of(of_bits(WIDE(model[i])) - of_bits(WIDE(base[i]))), magnitude = bits & 0x7fffffffu;                     \
            largest = magnitude > largest ? magnitude : largest;                                                                           \
            tau[i] = of_bits((magnitude >= low) & (magnitude <= high) ? bits : 0);                                                         \
        }                                                                                                                                  \
        return largest;                                                                                                                    \
    }

DIFFERENCE(difference16, uint16_t, WIDE16)
DIFFERENCE(difference32, uint32_t, WIDE32)

/* out = out + c (model - base); returns the bits of the largest |model - base| */
#define WEIGHTED(NAME, TYPE, WIDE)                                                                                                         \
    EACH_CPU static uint32_t NAME(const TYPE *restrict base, const TYPE *restrict model, float c, float *restrict out, size_t count) {     \
        uint32_t largest = 0;                                                                                                              \
        for (size_t i = 0; i < count; i++) {                                                                                               \
            float tau = of_bits(WIDE(model[i])) - of_bits(WIDE(base[i]));                                                                  \
            uint32_t magnitude = bits_of(tau) & 0x7fffffffu;                                                                               \
            largest = magnitude > largest ? magnitude : largest;                                                                           \
            out[i] += c * tau;                                                                                                             \
        }                                                                                                                                  \
        return largest;                                                                                                                    \
    }

WEIGHTED(weighted16, uint16_t, WIDE16)
WEIGHTED(weighted32, uint32_t, WIDE32)

/* Numbers start..start+count of a sequence, of 16 bits each, four from a word of splitmix64; `numbers` has room for 8 more. */
static const uint16_t *sixteen_bits(uint64_t key, uint64_t start, size_t count, uint16_t *numbers) {
    uint64_t first = start / 4, last = (start + count + 3) / 4;
    for (uint64_t word = first; word < last; word++) {
        uint64_t z = key + (word + 1) * GOLDEN;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        memcpy(numbers + 4 * (word - first), &z, 8);
    }
    return numbers + (start - 4 * first);
}

EACH_CPU static void drop(const uint16_t *restrict numbers, uint32_t dropped, float *restrict tau, size_t count) {
    for (size_t i = 0; i < count; i++) tau[i] = numbers[i] >= dropped ? tau[i] : 0.0f;
}

/* In an election by number of models, each votes with the sign of its increment. */
EACH_CPU static void sign_of(const float *restrict tau, float *restrict ballot, size_t count) {
    for (size_t i = 0; i < count; i++) ballot[i] = (float)((tau[i] > 0.0f) - (tau[i] < 0.0f));
}

EACH_CPU static void add(float c, const float *restrict tau, float *restrict out, size_t count) {
    for (size_t i = 0; i < count; i++) out[i] += c * tau[i];
}

EACH_CPU static int32_t signs(float *restrict mass, int zero_is_plus, size_t count) {
    int32_t balance = 0;
    for (size_t i = 0; i < count; i++) balance += (mass[i] > 0.0f) - (mass[i] < 0.0f);
    for (size_t i = 0; i < count; i++) mass[i] = (mass[i] > 0.0f) | ((mass[i] == 0.0f) & zero_is_plus) ? 1.0f : -1.0f;
    return balance;
}

EACH_CPU static void add_agreeing(const float *restrict sign, float vote, float factor, float share, const float *restrict tau, float *restrict out,
                                  float *restrict divisor, size_t count) {
    for (size_t i = 0; i < count; i++) {
        int agrees = tau[i] * vote * sign[i] > 0.0f;
        float value = factor * tau[i];
        out[i] += agrees ? value : 0.0f;
        divisor[i] += agrees ? share : 0.0f;
    }
}

EACH_CPU static void divide(float *restrict out, const float *restrict divisor, size_t count) {
    for (size_t i = 0; i < count; i++) out[i] /= divisor[i] == 0.0f ? 1.0f : divisor[i];
}

/* At most CHUNK entries, the first of which has the number `start` in its tensor. `taus` has room for n x CHUNK. Without `out` an election
 * is held for its balance alone. */
static void combine(const Rule *rule, int bf16, const void *base, const void *const *models, uint64_t start, size_t count, float *taus, float *out,
                    Seen *seen) {
    float sign[CHUNK], divisor[CHUNK];
    uint16_t numbers[CHUNK + 8];
    if (out) memset(out, 0, count * sizeof *out);
    if (!rule->elect && !rule->keys && rule->all) { /* a plain sum: the increments are never written down */
        for (int k = 0; k < rule->n; k++) {
            uint32_t largest = bf16 ? weighted16(base, models[k], rule->factors[k], out, count) : weighted32(base, models[k], rule->factors[k], out, count);
            seen->largest = largest > seen->largest ? largest : seen->largest;
        }
        return;
    }
    memset(sign, 0, count * sizeof *sign);
    for (int k = 0; k < rule->n; k++) {
        float *tau = rule->elect ? taus + (size_t)k * CHUNK : taus;
        uint32_t largest = bf16 ? difference16(base, models[k], rule->least[k], rule->most[k], tau, count)
                                : difference32(base, models[k], rule->least[k], rule->most[k], tau, count);
        seen->largest = largest > seen->largest ? largest : seen->largest;
        if (rule->keys) drop(sixteen_bits(rule->keys[k], start, count, numbers), rule->dropped, tau, count);
        if (rule->elect == BY_COUNT) sign_of(tau, divisor, count);
        add(rule->elect ? rule->votes[k] : rule->factors[k], rule->elect == BY_COUNT ? divisor : tau, rule->elect ? sign : out, count);
    }
    if (!rule->elect) return;
    seen->balance += signs(sign, rule->zero_is_plus, count);
    if (!out) return;
    memset(divisor, 0, count * sizeof *divisor);
    for (int k = 0; k < rule->n; k++)
        add_agreeing(sign, rule->votes[k], rule->factors[k], rule->shares[k], taus + (size_t)k * CHUNK, out, divisor, count);
    divide(out, divisor, count);
}

/* new = stored bits of (old + by), those of old where both are zero; returns how many entries changed */
#define SETTLED(NAME, TYPE, WIDE, ROUND, SHIFT)                                                                                            \
    EACH_CPU static uint32_t NAME(const TYPE *restrict old, const float *restrict by, TYPE *restrict new, size_t count) {                  \
        uint32_t changed = 0;                                                                                                              \
        for (size_t i = 0; i < count; i++) {                                                                                               \
            uint32_t was = WIDE(old[i]), sum = bits_of(of_bits(was) + by[i]);                                                              \
            uint32_t to = ROUND(sum);                                                                                                      \
            to = ((sum | was) << 1) == 0 ? was : to; /* -0 + 0 is +0: a zero that stays zero keeps its sign */                             \
            new[i] = (TYPE)(to >> SHIFT);                                                                                                  \
        }                                                                                                                                  \
        for (size_t i = 0; i < count; i++) changed += new[i] != old[i];                                                                    \
        return changed;                                                                                                                    \
    }

/* sums[0] += |new - old|^2, sums[1] += |old|^2: float32 within a chunk, float64 over chunks */
#define NORMS(NAME, TYPE, WIDE)                                                                                                            \
    EACH_CPU static void NAME(const TYPE *restrict old, const TYPE *restrict new, size_t count, double *restrict sums) {                   \
        float step[CHUNK], was[CHUNK];                                                                                                     \
        Lanes moved = {0}, norm = {0}, x, y;                                                                                               \
        for (size_t i = 0; i < count; i++) {                                                                                               \
            was[i] = of_bits(WIDE(old[i]));                                                                                                \
            step[i] = of_bits(WIDE(new[i])) - was[i];                                                                                      \
        }                                                                                                                                  \
        for (size_t i = count; i % LANES; i++) was[i] = step[i] = 0.0f;                                                                    \
        for (size_t i = 0; i < count; i += LANES) {                                                                                        \
            memcpy(&x, step + i, sizeof x);                                                                                                \
            memcpy(&y, was + i, sizeof y);                                                                                                 \
            moved += x * x;                                                                                                                \
            norm += y * y;                                                                                                                 \
        }                                                                                                                                  \
        for (int k = 0; k < LANES; k++) {                                                                                                  \
            sums[0] += (double)moved[k];                                                                                                   \
            sums[1] += (double)norm[k];                                                                                                    \
        }                                                                                                                                  \
    }

SETTLED(settled16, uint16_t, WIDE16, ROUND16, 16)
SETTLED(settled32, uint32_t, WIDE32, ROUND32, 0)
NORMS(norms16, uint16_t, WIDE16)
NORMS(norms32, uint32_t, WIDE32)

static int64_t settle(int bf16, const void *old, const float *by, void *new, size_t count, double *sums) {
    int64_t changed = bf16 ? settled16(old, by, new, count) : settled32(old, by, new, count);
    if (bf16)
        norms16(old, new, count, sums);
    else
        norms32(old, new, count, sums);
    return changed;
}

PUBLIC int64_t weft_settled(int bf16, const void *old, const float *by, void *new, size_t count, double *sums) {
    size_t width = bf16 ? 2 : 4;
    int64_t changed = 0;
    for (size_t i = 0; i < count; i += CHUNK)
        changed += settle(bf16, (const char *)old + i * width, by + i, (char *)new + i * width, count - i < CHUNK ? count - i : CHUNK, sums);
    return changed;
}

/* The combination of models in memory, from entry `start` of their tensor on. 1: an increment is not finite. -1: no memory. */
PUBLIC int weft_combined(int n, const float *numbers, const uint64_t *keys, uint32_t dropped, int elect, int zero_is_plus, int bf16, const void *base,
                         const void *const *models, uint64_t start, size_t count, float *out) {
    Rule rule = rule_of(n, numbers, keys, dropped, elect, zero_is_plus);
    Seen seen = {0, 0};
    size_t width = bf16 ? 2 : 4;
    float *taus = malloc((size_t)n * CHUNK * sizeof *taus);
    const char **at = malloc((size_t)n * sizeof *at);
    for (size_t i = 0; taus && at && i < count; i += CHUNK) {
        for (int k = 0; k < n; k++) at[k] = (const char *)models[k] + i * width;
        combine(&rule, bf16, (const char *)base + i * width, (const void *const *)at, start + i, count - i < CHUNK ? count - i : CHUNK, taus, out + i, &seen);
    }
    int failed = taus && at ? seen.largest >= 0x7f800000u : -1;
    free(taus);
    free(at);
    return failed;
}

static int read_all(int fd, char *to, size_t count, int64_t position) {
    while (count) {
        errno = 0;
        ssize_t done = pread(fd, to, count, position);
        if (done <= 0) return 0;
        to += done, count -= (size_t)done, position += done;
    }
    return 1;
}

static int write_all(int fd, const char *from, size_t count, int64_t position) {
    while (count) {
        ssize_t done = pwrite(fd, from, count, position);
        if (done < 0) return 0;
        from += done, count -= (size_t)done, position += done;
    }
    return 1;
}

/* Base and models read from files, combined, settled, written: nothing larger than the second cache is ever in memory. `places` are the
 * positions of the first entry in the base's and each model's file. With out < 0 nothing is written and only the election's balance found.
 * found: changed entries, balance. 1: an increment is not finite. -1: no memory. -2: reading, -3: writing failed (errno is in found[0]). */
PUBLIC int weft_merged(int n, const float *numbers, const uint64_t *keys, uint32_t dropped, int elect, int zero_is_plus, int bf16, const int *fds,
                       const int64_t *places, uint64_t start, size_t count, int out, int64_t position, int64_t *found, double *sums) {
    Rule rule = rule_of(n, numbers, keys, dropped, elect, zero_is_plus);
    Seen seen = {0, 0};
    size_t width = bf16 ? 2 : 4, room = PIECE * width;
    char *stored = malloc((size_t)(n + 2) * room);
    float *taus = malloc((size_t)(n + 1) * CHUNK * sizeof *taus), *by = taus + (size_t)n * CHUNK;
    const void **at = malloc((size_t)n * sizeof *at);
    int failed = stored && taus && at ? 0 : -1;
    char *new = stored + (size_t)(n + 1) * room;
    for (size_t piece = 0; !failed && piece < count; piece += PIECE) {
        size_t here = count - piece < PIECE ? count - piece : PIECE;
        for (int k = 0; k <= n && !failed; k++)
            if (!read_all(fds[k], stored + (size_t)k * room, here * width, places[k] + (int64_t)(piece * width))) failed = -2;
        for (size_t i = 0; !failed && i < here; i += CHUNK) {
            size_t size = here - i < CHUNK ? here - i : CHUNK;
            for (int k = 0; k < n; k++) at[k] = stored + (size_t)(k + 1) * room + i * width;
            combine(&rule, bf16, stored + i * width, at, start + piece + i, size, taus, out < 0 && elect ? NULL : by, &seen);
            if (out >= 0) found[0] += settle(bf16, stored + i * width, by, new + i * width, size, sums);
        }
        if (seen.largest >= 0x7f800000u)
            failed = 1;
        else if (!failed && out >= 0 && !write_all(out, new, here * width, position + (int64_t)(piece * width)))
            failed = -3;
    }
    if (failed < -1) found[0] = errno;
    found[1] = seen.balance;
    free(stored);
    free(taus);
    free(at);
    return failed;
}

/* The bits of |model - base| */
#define MAGNITUDES(NAME, TYPE, WIDE)                                                                                                       \
    EACH_CPU static uint32_t NAME(const TYPE *restrict base, const TYPE *restrict model, uint32_t *restrict out, size_t count) {           \
        uint32_t largest = 0;                                                                                                              \
        for (size_t i = 0; i < count; i++) {                                                                                               \
            out[i] = bits_of(of_bits(WIDE(model[i])) - of_bits(WIDE(base[i]))) & 0x7fffffffu;                                              \
            largest = out[i] > largest ? out[i] : largest;                                                                                 \
        }                                                                                                                                  \
        return largest;                                                                                                                    \
    }

MAGNITUDES(magnitudes16, uint16_t, WIDE16)
MAGNITUDES(magnitudes32, uint32_t, WIDE32)

/* counts: entries above high, equal to it, equal to low, and strictly between */
EACH_CPU static void near(const uint32_t *restrict size, uint32_t low, uint32_t high, size_t count, uint32_t *restrict counts) {
    uint32_t above = 0, top = 0, bottom = 0, between = 0;
    for (size_t i = 0; i < count; i++) {
        above += size[i] > high;
        top += size[i] == high;
        bottom += (size[i] == low) & (low != high);
        between += (size[i] > low) & (size[i] < high);
    }
    counts[0] = above, counts[1] = top, counts[2] = bottom, counts[3] = between;
}

/* For each of m pairs (low, high) of magnitudes: counts as above, and the magnitudes strictly between, of which `inner` has room for `room` + 1 each; if there
 * are more, counts[4] is 1 and they are not all there. Results as weft_merged. */
PUBLIC int weft_near(int bf16, const int *fds, const int64_t *places, size_t count, int m, const float *limits, float *inner, size_t room, int64_t *counts) {
    size_t width = bf16 ? 2 : 4;
    char *stored = malloc(2 * PIECE * width);
    uint32_t size[CHUNK], found[4], largest = 0;
    int failed = stored ? 0 : -1;
    for (size_t piece = 0; !failed && piece < count; piece += PIECE) {
        size_t here = count - piece < PIECE ? count - piece : PIECE;
        for (int k = 0; k < 2 && !failed; k++)
            if (!read_all(fds[k], stored + (size_t)k * PIECE * width, here * width, places[k] + (int64_t)(piece * width))) failed = -2;
        for (size_t i = 0; !failed && i < here; i += CHUNK) {
            size_t many = here - i < CHUNK ? here - i : CHUNK;
            const void *base = stored + i * width, *model = stored + (PIECE + i) * width;
            uint32_t most = bf16 ? magnitudes16(base, model, size, many) : magnitudes32(base, model, size, many);
            largest = most > largest ? most : largest;
            for (int k = 0; k < m; k++) {
                uint32_t low = bits_of(limits[2 * k]), high = bits_of(limits[2 * k + 1]);
                int64_t *sums = counts + 5 * k;
                near(size, low, high, many, found);
                if (found[3] && (uint64_t)sums[3] + found[3] > room) sums[4] = 1;
                if (found[3] && !sums[4]) {
                    float *to = inner + (size_t)k * (room + 1) + sums[3]; /* one more than there is room for: every entry is written, few stay */
                    for (size_t j = 0; j < many; j++) {
                        *to = of_bits(size[j]);
                        to += (size[j] > low) & (size[j] < high);
                    }
                }
                for (int c = 0; c < 4; c++) sums[c] += found[c];
            }
        }
    }
    free(stored);
    if (failed < -1) counts[0] = errno;
    return failed ? failed : largest >= 0x7f800000u;
}

/* A module without contents: the functions are called through ctypes, which lets other threads run meanwhile. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused_loops", "The compiled loops of weft._fused.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__fused_loops(void) { return PyModule_Create(&module); }
