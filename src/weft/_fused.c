/* The inner loops of merging and folding: what numpy does in a dozen passes over a block, in one or two.
 *
 * Optional: weft/_fused.py has the same in numpy, bit for bit, and says what each function means; it is used where this
 * file was not compiled. Only single IEEE operations in a fixed order (compiled without contraction to fused
 * multiply-add), so the bits are the same on every machine. Stored values are bfloat16 or float32, little-endian.
 */
#define PY_SSIZE_T_CLEAN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* sync_file_range */
#endif
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#if __GNUC__ >= 12
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define EACH_CPU
#endif
#define PUBLIC __attribute__((visibility("default"))) /* gcc and clang; elsewhere this does not compile, and numpy does the work */
#define INLINE static inline __attribute__((always_inline)) /* into each CPU's version, with its flags as constants */

#define CHUNK 1024 /* entries that stay in the first cache while several loops go over them */
#define PIECE 32768 /* entries that stay in the second cache between reading and writing */
#define WRITE 8    /* pieces that are written at once: small writes cost several times as much */
#define LANES 16   /* entries in one wide register, or several narrow ones */
#define GROUP (2 * LANES) /* entries that are worked on at once */

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Bits __attribute__((vector_size(LANES * 4))); /* of floats, or masks: -1 where something holds, 0 elsewhere */

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

#define NUMBERS (CHUNK + 8 + GROUP) /* in a row of random numbers, which are made four at a time and read by groups */
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
    int odd;         /* an increment is infinite or NaN */
    int64_t balance;  /* entries at which plus won the election, less those at which minus did */
} Seen;

static Rule rule_of(int n, const float *numbers, const uint64_t *keys, uint32_t dropped, int elect, int zero_is_plus) {
    int all = 1;
    for (int k = 0; k < n; k++) all &= numbers[k] == 0.0f && bits_of(numbers[n + k]) == 0x7f800000u;
    Rule rule = {n, elect, zero_is_plus, all, numbers, numbers + n, numbers + 2 * n, numbers + 3 * n, numbers + 4 * n, keys, dropped};
    return rule;
}

/* A group of entries as two registers of float32: entries 0, 2, 4.. and 1, 3, 5.. of bfloat16, so that each is one shift or mask away;
 * the first and the last ones of float32. Increments of a chunk stay in this order until they are settled. */
typedef struct {
    Floats half[2];
} Group;

INLINE Group load(int bf16, const void *from, size_t i) {
    Words stored;
    Group group;
    if (bf16) {
        memcpy(&stored, (const uint16_t *)from + i, sizeof stored);
        group.half[0] = (Floats)(stored << 16);
        group.half[1] = (Floats)(stored & 0xffff0000u);
    } else {
        memcpy(&group, (const float *)from + i, sizeof group);
    }
    return group;
}

/* Half of a group of 16-bit numbers, in the same order. */
INLINE Words half_of(int bf16, const uint16_t *numbers, int h) {
    Words both;
    Shorts some;
    if (bf16) {
        memcpy(&both, numbers, sizeof both);
        return h ? both >> 16 : both & 0xffffu;
    }
    memcpy(&some, numbers + h * LANES, sizeof some);
    return __builtin_convertvector(some, Words);
}

/* Floats in their own order to the order of groups, and back. `to` has room for whole groups. */
EACH_CPU static void grouped(int bf16, const float *restrict from, float *restrict to, size_t count) {
    size_t whole = bf16 ? count / GROUP * GROUP : 0;
    for (size_t i = 0; i < whole; i += GROUP)
        for (size_t j = 0; j < LANES; j++) to[i + j] = from[i + 2 * j], to[i + LANES + j] = from[i + 2 * j + 1];
    for (size_t i = whole; i < count; i++) to[bf16 ? whole + (i - whole) / 2 + (i - whole) % 2 * LANES : i] = from[i];
}

EACH_CPU static void ungrouped(int bf16, const float *restrict from, float *restrict to, size_t count) {
    size_t whole = bf16 ? count / GROUP * GROUP : 0;
    for (size_t i = 0; i < whole; i += GROUP)
        for (size_t j = 0; j < LANES; j++) to[i + 2 * j] = from[i + j], to[i + 2 * j + 1] = from[i + LANES + j];
    for (size_t i = whole; i < count; i++) to[i] = from[bf16 ? whole + (i - whole) / 2 + (i - whole) % 2 * LANES : i];
}

/* Masks, made by shifts of sign bits: of comparisons that are combined, gcc makes one branch for each lane. Floats are compared as integers, which
 * have the same order but for -0. */
INLINE Bits negative(Bits values) { return values >> 31; }

INLINE Bits positive(Bits values) { return ~negative((Bits)((Words)values - 1u) | values); }

INLINE Floats where(Bits mask, Floats value) { return (Floats)(mask & (Bits)value); }

INLINE int32_t sum_of(Bits values) {
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
}

/* Numbers start..start+count of a sequence, of 16 bits each, four from a word of splitmix64; `numbers` has room for 8 more. */
EACH_CPU static const uint16_t *sixteen_bits(uint64_t key, uint64_t start, size_t count, uint16_t *numbers) {
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

/* A chunk of several increments becomes one. `numbers`: a row of random numbers for each model. `taus` has room for n groups. */
INLINE void combine_as(int bf16, int elect, int masked, int limited, const Rule *rule, const void *base, const void *const *models,
                       const uint16_t *const *numbers, size_t count, Group *taus, float *out, Seen *seen) {
    const Bits tie = (Bits){0} - (rule->zero_is_plus != 0), one = (Bits){0} + (int32_t)0x3f800000, topmost = (Bits){0} + INT32_MIN;
    Words odd = {0};
    Bits balance = {0};
    for (size_t i = 0; i < count; i += GROUP) {
        const Group was = load(bf16, base, i);
        Group total = {{{0}, {0}}}, mass = total, divisor = total;
        for (int k = 0; k < rule->n; k++) {
            const Group is = load(bf16, models[k], i);
            Words drawn[2];
            if (masked) {
                for (int h = 0; h < 2; h++) drawn[h] = half_of(bf16, numbers[k] + i, h);
            }
            for (int h = 0; h < 2; h++) {
                Bits bits = (Bits)(is.half[h] - was.half[h]), size = bits & INT32_MAX;
                odd |= (Words)size + 0x00800000u; /* the top bit: of an infinity or NaN */
                if (limited) bits &= ~negative((size - (int32_t)bits_of(rule->least[k])) | ((int32_t)bits_of(rule->most[k]) - size));
                if (masked) bits &= ~negative((Bits)drawn[h] - (int32_t)rule->dropped);
                if (!elect) {
                    total.half[h] += rule->factors[k] * (Floats)bits;
                } else {
                    taus[k].half[h] = (Floats)bits;
                    if (elect == BY_COUNT) bits = ((bits & topmost) | one) & positive(bits & INT32_MAX);
                    mass.half[h] += rule->votes[k] * (Floats)bits; /* never -0, since it starts from 0 */
                }
            }
        }
        if (elect) {
            Group sign;
            for (int h = 0; h < 2; h++) {
                Bits minus = negative((Bits)mass.half[h]), plus = positive((Bits)mass.half[h]);
                balance += minus - plus;
                sign.half[h] = (Floats)(one | (~(plus | (~minus & tie)) & topmost));
            }
            if (!out) continue;
            for (int k = 0; k < rule->n; k++) {
                for (int h = 0; h < 2; h++) {
                    Floats tau = taus[k].half[h];
                    Bits agrees = positive((Bits)(tau * rule->votes[k] * sign.half[h]));
                    total.half[h] += where(agrees, rule->factors[k] * tau);
                    divisor.half[h] += where(agrees, (Floats){0} + rule->shares[k]);
                }
            }
            for (int h = 0; h < 2; h++) total.half[h] /= (Floats)((Bits)divisor.half[h] | (~positive((Bits)divisor.half[h]) & one));
        }
        memcpy(out + i, &total, sizeof total);
    }
    for (int lane = 0; lane < LANES; lane++) seen->odd |= (int)(odd[lane] >> 31);
    seen->balance += sum_of(balance);
}

/* The same with each kind of rule known to the compiler. */
#define COMBINE(NAME, BF16)                                                                                                                \
    EACH_CPU static void NAME(const Rule *rule, const void *base, const void *const *models, const uint16_t *const *numbers, size_t count, \
                              Group *taus, float *out, Seen *seen) {                                                                       \
        if (rule->elect == BY_COUNT)                                                                                                       \
            combine_as(BF16, BY_COUNT, numbers != NULL, 1, rule, base, models, numbers, count, taus, out, seen);                           \
        else if (rule->elect && numbers)                                                                                                   \
            combine_as(BF16, BY_MASS, 1, !rule->all, rule, base, models, numbers, count, taus, out, seen);                                 \
        else if (rule->elect)                                                                                                              \
            combine_as(BF16, BY_MASS, 0, !rule->all, rule, base, models, numbers, count, taus, out, seen);                                 \
        else if (numbers)                                                                                                                  \
            combine_as(BF16, NO_ELECTION, 1, !rule->all, rule, base, models, numbers, count, taus, out, seen);                             \
        else if (rule->all)                                                                                                                \
            combine_as(BF16, NO_ELECTION, 0, 0, rule, base, models, numbers, count, taus, out, seen);                                      \
        else                                                                                                                               \
            combine_as(BF16, NO_ELECTION, 0, 1, rule, base, models, numbers, count, taus, out, seen);                                      \
    }

COMBINE(combine16, 1)
COMBINE(combine32, 0)

/* new = stored bits of (old + by), those of old where both are zero; returns how many entries changed.
 * sums[0] += |new - old|^2, sums[1] += |old|^2: float32 within a chunk, float64 over chunks */
INLINE uint32_t settle_as(int bf16, const void *old, const float *by, void *new, size_t count, double *sums) {
    Floats moved = {0}, norm = {0};
    Bits same = {0};
    for (size_t i = 0; i < count; i += GROUP) {
        const Group was = load(bf16, old, i);
        Group plus;
        Words now[2];
        memcpy(&plus, by + i, sizeof plus);
        for (int h = 0; h < 2; h++) {
            Words before = (Words)was.half[h], sum = (Words)(was.half[h] + plus.half[h]), to = sum;
            if (bf16) to = (to + 0x7fffu + ((to >> 16) & 1u)) & 0xffff0000u; /* nearest even; a bfloat16 NaN stays what it is */
            Words zero = (Words)(((sum | before) << 1) == 0); /* -0 + 0 is +0: a zero that stays zero keeps its sign */
            now[h] = (before & zero) | (to & ~zero);
            Floats step = (Floats)now[h] - was.half[h];
            moved += step * step;
            norm += was.half[h] * was.half[h];
            same += (Bits)now[h] == (Bits)before;
        }
        if (bf16) {
            now[0] = (now[0] >> 16) | now[1];
            memcpy((uint16_t *)new + i, now, sizeof(Words));
        } else {
            memcpy((float *)new + i, now, sizeof now);
        }
    }
    for (int lane = 0; lane < LANES; lane++) {
        sums[0] += (double)moved[lane];
        sums[1] += (double)norm[lane];
    }
    return (uint32_t)count + (uint32_t)sum_of(same);
}

EACH_CPU static uint32_t settle16(const void *old, const float *by, void *new, size_t count, double *sums) { return settle_as(1, old, by, new, count, sums); }

EACH_CPU static uint32_t settle32(const void *old, const float *by, void *new, size_t count, double *sums) { return settle_as(0, old, by, new, count, sums); }

/* At most CHUNK entries, any number of them: what is left over after whole groups goes through buffers that are filled up with zeros. */
static int64_t settle(int bf16, const void *old, const float *by, void *new, size_t count, double *sums) {
    size_t whole = count / GROUP * GROUP, rest = count - whole, width = bf16 ? 2 : 4;
    int64_t changed = bf16 ? settle16(old, by, new, whole, sums) : settle32(old, by, new, whole, sums);
    if (rest) {
        char was[GROUP * 4] = {0}, is[GROUP * 4];
        memcpy(was, (const char *)old + whole * width, rest * width);
        changed += bf16 ? settle16(was, by + whole, is, GROUP, sums) : settle32(was, by + whole, is, GROUP, sums);
        memcpy((char *)new + whole * width, is, rest * width);
    }
    return changed;
}

PUBLIC int64_t weft_settled(int bf16, const void *old, const float *by, void *new, size_t count, double *sums) {
    size_t width = bf16 ? 2 : 4;
    int64_t changed = 0;
    float plus[CHUNK] = {0};
    for (size_t i = 0; i < count; i += CHUNK) {
        size_t size = count - i < CHUNK ? count - i : CHUNK;
        if (size < CHUNK) memset(plus, 0, sizeof plus);
        grouped(bf16, by + i, plus, size);
        changed += settle(bf16, (const char *)old + i * width, plus, (char *)new + i * width, size, sums);
    }
    return changed;
}

/* What combining needs beside the models: rows of pointers and of random numbers, and for the last entries of each model, fewer than a group. */
typedef struct {
    Group *taus;
    uint16_t *numbers;
    const uint16_t **drawn;
    const void **at, **ends;
    char *tail;
} Room;

static int make_room(Room *room, int n) {
    size_t rows = (size_t)n + 1;
    room->taus = aligned_alloc(sizeof(Group), rows * sizeof(Group));
    room->numbers = malloc(rows * NUMBERS * sizeof *room->numbers);
    room->drawn = malloc(rows * sizeof *room->drawn);
    room->at = malloc(rows * sizeof *room->at);
    room->ends = malloc(rows * sizeof *room->ends);
    room->tail = malloc(rows * GROUP * 4);
    return room->taus && room->numbers && room->drawn && room->at && room->ends && room->tail;
}

static void free_room(Room *room) {
    free(room->taus);
    free(room->numbers);
    free(room->drawn);
    free(room->at);
    free(room->ends);
    free(room->tail);
}

/* At most CHUNK entries, the first of which has the number `start` in its tensor; `at` points to the models' values, and to the base's for k = n.
 * `out` gets whole groups, zeros after the last entry. Without it, an election is held for its balance alone. */
static void combine(const Rule *rule, int bf16, const void *const *at, uint64_t start, size_t count, Room *room, float *out, Seen *seen) {
    int n = rule->n;
    size_t whole = count / GROUP * GROUP, rest = count - whole, width = bf16 ? 2 : 4;
    const uint16_t **drawn = rule->keys ? room->drawn : NULL;
    for (int k = 0; drawn && k < n; k++) drawn[k] = sixteen_bits(rule->keys[k], start, count, room->numbers + (size_t)k * NUMBERS);
    (bf16 ? combine16 : combine32)(rule, at[n], at, drawn, whole, room->taus, out, seen);
    if (!rest) return;
    memset(room->tail, 0, ((size_t)n + 1) * GROUP * 4);
    for (int k = 0; k <= n; k++) {
        room->ends[k] = memcpy(room->tail + (size_t)k * GROUP * 4, (const char *)at[k] + whole * width, rest * width);
        if (drawn && k < n) drawn[k] += whole;
    }
    (bf16 ? combine16 : combine32)(rule, room->ends[n], room->ends, drawn, GROUP, room->taus, out ? out + whole : NULL, seen);
}

/* Which arguments the functions here take: _fused.py uses them only if it knows this number. */
PUBLIC int weft_loops(void) { return 2; }

/* The combination of models in memory, from entry `start` of their tensor on; the base stands behind the models. 1: an increment is not finite.
 * -1: no memory. */
PUBLIC int weft_combined(int n, const float *numbers, const uint64_t *keys, uint32_t dropped, int elect, int zero_is_plus, int bf16,
                         const void *const *models, uint64_t start, size_t count, float *out) {
    Rule rule = rule_of(n, numbers, keys, dropped, elect, zero_is_plus);
    Seen seen = {0, 0};
    Room room;
    float by[CHUNK];
    int failed = make_room(&room, n) ? 0 : -1;
    for (size_t i = 0; !failed && i < count; i += CHUNK) {
        size_t size = count - i < CHUNK ? count - i : CHUNK;
        for (int k = 0; k <= n; k++) room.at[k] = (const char *)models[k] + i * (bf16 ? 2 : 4);
        combine(&rule, bf16, room.at, start + i, size, &room, by, &seen);
        ungrouped(bf16, by, out + i, size);
    }
    free_room(&room);
    return failed ? failed : seen.odd;
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
#ifdef SYNC_FILE_RANGE_WRITE
    int64_t begin = position, size = (int64_t)count;
#endif
    while (count) {
        ssize_t done = pwrite(fd, from, count, position);
        if (done < 0) return 0;
        from += done, count -= (size_t)done, position += done;
    }
#ifdef SYNC_FILE_RANGE_WRITE
    if (size >= PIECE) sync_file_range(fd, begin, size, SYNC_FILE_RANGE_WRITE); /* the disk may begin: whoever syncs later waits less */
#endif
    return 1;
}

/* For each of several jobs: base and models read from files, combined, settled, written; never more than some pieces are in memory. `places` are
 * the positions of the first entry in the files of the models and of the base (the last), `outs` those in the file `out`. With out < 0 nothing is
 * written: the combined increments are put into memory (`into`, `outs` being entries), or only the election's balance is found. Each job has its
 * own numbers and keys, and in `found`: changed entries, balance. Returns 0, or what went wrong with the first job that failed (found[0] is then
 * its number, found[1] errno): 1: an increment is not finite. -1: no memory. -2: reading, -3: writing failed. */
PUBLIC int weft_merged(int jobs, int n, const float *numbers, const uint64_t *keys, uint32_t dropped, int elect, int zero_is_plus, int bf16,
                       const int *fds, const int64_t *places, const int64_t *starts, const int64_t *counts, int out, const int64_t *outs, float *into,
                       int64_t *found, double *sums) {
    size_t width = bf16 ? 2 : 4, wide = PIECE * width, rows = (size_t)n + 1, many = out < 0 ? 0 : WRITE;
    char *stored = malloc((rows + many) * wide), *new = stored ? stored + rows * wide : NULL;
    float by[CHUNK];
    Room room;
    int failed = make_room(&room, n) && stored ? 0 : -1, job = 0;
    for (; !failed && job < jobs; job++) {
        Rule rule = rule_of(n, numbers + (size_t)job * 5 * n, keys ? keys + (size_t)job * n : NULL, dropped, elect, zero_is_plus);
        Seen seen = {0, 0};
        size_t count = (size_t)counts[job], written = 0;
        for (size_t piece = 0; !failed && piece < count; piece += PIECE) {
            size_t here = count - piece < PIECE ? count - piece : PIECE, held = piece - written;
            for (size_t k = 0; k < rows && !failed; k++)
                if (!read_all(fds[job * rows + k], stored + k * wide, here * width, places[job * rows + k] + (int64_t)(piece * width))) failed = -2;
            for (size_t i = 0; !failed && i < here; i += CHUNK) {
                size_t size = here - i < CHUNK ? here - i : CHUNK;
                for (size_t k = 0; k < rows; k++) room.at[k] = stored + k * wide + i * width;
                combine(&rule, bf16, room.at, (uint64_t)starts[job] + piece + i, size, &room, out < 0 && !into && elect ? NULL : by, &seen);
                if (into) ungrouped(bf16, by, into + outs[job] + piece + i, size);
                if (out >= 0) found[2 * job] += settle(bf16, room.at[n], by, new + (held + i) * width, size, sums + 2 * job);
            }
            if (seen.odd)
                failed = 1;
            else if (!failed && out >= 0 && (held + here == WRITE * PIECE || piece + here == count)) {
                if (!write_all(out, new, (held + here) * width, outs[job] + (int64_t)(written * width))) failed = -3;
                written = piece + here;
            }
        }
        found[2 * job + 1] = seen.balance;
    }
    if (failed) found[0] = job - 1, found[1] = errno;
    free_room(&room);
    free(stored);
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

/* Puts the magnitudes strictly between low and high behind `to`, which needs room for one more. Most vectors have none. `size` ends
 * with zeros up to whole vectors. */
EACH_CPU static void gather(const uint32_t *size, uint32_t low, uint32_t high, size_t count, float *to) {
    for (size_t i = 0; i < count; i += LANES) {
        Bits values;
        uint64_t found[LANES / 2], any = 0;
        memcpy(&values, size + i, sizeof values);
        values = negative(((int32_t)low - values) & (values - (int32_t)high));
        memcpy(found, &values, sizeof found);
        for (int k = 0; k < LANES / 2; k++) any |= found[k];
        if (!any) continue;
        for (size_t j = i; j < i + LANES; j++) {
            *to = of_bits(size[j]);
            to += (size[j] > low) & (size[j] < high);
        }
    }
}

/* For each of m pairs (low, high) of magnitudes of the increments of one model: counts as above over all jobs, and the magnitudes strictly between, of which
 * `inner` has room for `room` + 1 each; if there are more, counts[4] is 1 and they are not all there. `fds` and `places` are the model's and the base's.
 * Results as weft_merged. */
PUBLIC int weft_near(int jobs, int bf16, const int *fds, const int64_t *places, const int64_t *sizes, int m, const float *limits, float *inner, size_t room,
                     int64_t *counts) {
    size_t width = bf16 ? 2 : 4;
    char *stored = malloc(2 * PIECE * width);
    uint32_t size[CHUNK], found[4], largest = 0;
    int failed = stored ? 0 : -1, job = 0;
    for (; !failed && job < jobs; job++) {
        size_t count = (size_t)sizes[job];
        for (size_t piece = 0; !failed && piece < count; piece += PIECE) {
            size_t here = count - piece < PIECE ? count - piece : PIECE;
            for (int k = 0; k < 2 && !failed; k++)
                if (!read_all(fds[2 * job + k], stored + (size_t)k * PIECE * width, here * width, places[2 * job + k] + (int64_t)(piece * width))) failed = -2;
            for (size_t i = 0; !failed && i < here; i += CHUNK) {
                size_t many = here - i < CHUNK ? here - i : CHUNK;
                const void *model = stored + i * width, *base = stored + (PIECE + i) * width;
                uint32_t most = bf16 ? magnitudes16(base, model, size, many) : magnitudes32(base, model, size, many);
                largest = most > largest ? most : largest;
                for (size_t j = many; j % LANES; j++) size[j] = 0;
                for (int k = 0; k < m; k++) {
                    uint32_t low = bits_of(limits[2 * k]), high = bits_of(limits[2 * k + 1]);
                    int64_t *sums = counts + 5 * k;
                    near(size, low, high, many, found);
                    if (found[3] && (uint64_t)sums[3] + found[3] > room) sums[4] = 1;
                    if (found[3] && !sums[4]) gather(size, low, high, many, inner + (size_t)k * (room + 1) + sums[3]);
                    for (int c = 0; c < 4; c++) sums[c] += found[c];
                }
            }
        }
    }
    free(stored);
    if (failed) counts[0] = job - 1, counts[1] = errno;
    return failed ? failed : largest >= 0x7f800000u;
}

/* A module without contents: the functions are called through ctypes, which lets other threads run meanwhile. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused_loops", "The compiled loops of weft._fused.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__fused_loops(void) { return PyModule_Create(&module); }
