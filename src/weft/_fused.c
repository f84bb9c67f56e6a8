/* The inner loops of merging and folding: what numpy does in a dozen passes over a block, in one or two.
 *
 * Optional: weft/_fused.py has the same in numpy, bit for bit, and says what each function means; it is used where this
 * file was not compiled. Only single IEEE operations in a fixed order (compiled without contraction to fused
 * multiply-add), so the bits are the same on every machine. Stored values are bfloat16 or float32, little-endian.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_CPU
#endif
#define PUBLIC __attribute__((visibility("default"))) /* gcc and clang; elsewhere this does not compile, and numpy does the work */

#define CHUNK 1024 /* entries that stay in the first cache while several loops go over them */
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

/* out = 0 + c (model - base), or out + c (model - base); returns the bits of the largest |model - base| */
#define WEIGHTED(NAME, TYPE, WIDE, SUM)                                                                                                    \
    EACH_CPU static uint32_t NAME(const TYPE *restrict base, const TYPE *restrict model, float c, float *restrict out, size_t count) {     \
        uint32_t largest = 0;                                                                                                              \
        for (size_t i = 0; i < count; i++) {                                                                                               \
            float tau = of_bits(WIDE(model[i])) - of_bits(WIDE(base[i]));                                                                  \
            uint32_t magnitude = bits_of(tau) & 0x7fffffffu;                                                                               \
            largest = magnitude > largest ? magnitude : largest;                                                                           \
            out[i] = SUM c * tau;                                                                                                          \
        }                                                                                                                                  \
        return largest;                                                                                                                    \
    }

WEIGHTED(first16, uint16_t, WIDE16, 0.0f +) /* no -0 */
WEIGHTED(first32, uint32_t, WIDE32, 0.0f +)
WEIGHTED(next16, uint16_t, WIDE16, out[i] +)
WEIGHTED(next32, uint32_t, WIDE32, out[i] +)

PUBLIC int weft_weighted(int bf16, const void *base, const void *const *models, const float *c, int n, float *out, size_t count) {
    uint32_t largest = 0;
    for (size_t start = 0; start < count; start += CHUNK) {
        size_t size = count - start < CHUNK ? count - start : CHUNK;
        for (int k = 0; k < n; k++) {
            uint32_t here;
            if (bf16)
                here = (k ? next16 : first16)((const uint16_t *)base + start, (const uint16_t *)models[k] + start, c[k], out + start, size);
            else
                here = (k ? next32 : first32)((const uint32_t *)base + start, (const uint32_t *)models[k] + start, c[k], out + start, size);
            largest = here > largest ? here : largest;
        }
    }
    return largest >= 0x7f800000u;
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

PUBLIC int64_t weft_settled(int bf16, const void *old, const float *by, void *new, size_t count, double *sums) {
    int64_t changed = 0;
    for (size_t start = 0; start < count; start += CHUNK) {
        size_t size = count - start < CHUNK ? count - start : CHUNK;
        if (bf16) {
            changed += settled16((const uint16_t *)old + start, by + start, (uint16_t *)new + start, size);
            norms16((const uint16_t *)old + start, (const uint16_t *)new + start, size, sums);
        } else {
            changed += settled32((const uint32_t *)old + start, by + start, (uint32_t *)new + start, size);
            norms32((const uint32_t *)old + start, (const uint32_t *)new + start, size, sums);
        }
    }
    return changed;
}

/* Of n increments tau_k, of which entries below h_k count as 0: the sign of sum_k e_k ballot_k wins; out = sum f_k tau_k / sum d_k over those
 * that voted for it. Returns at how many entries plus won, less those at which minus did. Without `out` nothing but that is found. */
EACH_CPU static int64_t elected(const float *const *taus, const float *const *ballots, int n, const float *numbers, int zero_is_plus, float *restrict out,
                                size_t start, size_t count) {
    const float *h = numbers, *e = h + n, *f = e + n, *d = f + n;
    float mass[CHUNK] = {0}, total[CHUNK] = {0}, divisor[CHUNK] = {0};
    int32_t balance = 0;
    for (int k = 0; k < n; k++) {
        const float *tau = taus[k] + start, *ballot = ballots[k] + start, least = h[k], vote = e[k];
        for (size_t i = 0; i < count; i++) mass[i] += (of_bits(bits_of(tau[i]) & 0x7fffffffu) >= least ? ballot[i] : 0.0f) * vote;
    }
    for (size_t i = 0; i < count; i++) balance += (mass[i] > 0.0f) - (mass[i] < 0.0f);
    if (!out) return balance;
    for (size_t i = 0; i < count; i++) mass[i] = (mass[i] > 0.0f) | ((mass[i] == 0.0f) & zero_is_plus) ? 1.0f : -1.0f;
    for (int k = 0; k < n; k++) {
        const float *tau = taus[k] + start, *ballot = ballots[k] + start, least = h[k], vote = e[k], factor = f[k], share = d[k];
        for (size_t i = 0; i < count; i++) {
            int agrees = (of_bits(bits_of(tau[i]) & 0x7fffffffu) >= least) & (ballot[i] * vote * mass[i] > 0.0f);
            float value = tau[i] * factor;
            total[i] += agrees ? value : 0.0f;
            divisor[i] += agrees ? share : 0.0f;
        }
    }
    for (size_t i = 0; i < count; i++) out[start + i] = total[i] / (divisor[i] == 0.0f ? 1.0f : divisor[i]);
    return balance;
}

PUBLIC int64_t weft_elected(const float *const *taus, const float *const *ballots, int n, const float *numbers, int zero_is_plus, float *out, size_t count) {
    int64_t balance = 0;
    for (size_t start = 0; start < count; start += CHUNK)
        balance += elected(taus, ballots, n, numbers, zero_is_plus, out, start, count - start < CHUNK ? count - start : CHUNK);
    return balance;
}

/* A module without contents: the functions are called through ctypes, which lets other threads run meanwhile. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused_loops", "The compiled loops of weft._fused.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__fused_loops(void) { return PyModule_Create(&module); }
