/* The elementwise techniques, fused: one pass over the inputs, in which every value stays in a register.

   The functions are in elementwise.h, written with the vector types of GCC and Clang: operators on them work element by
   element. It is compiled once for each level of the x86-64 instruction set, and the caller takes the highest that the
   processor has. The levels give the same bytes: each operation is IEEE 754 single precision, none is contracted or
   reassociated (-ffp-contract=off), and each is the one that the techniques do in torch, which are the reference. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the random bits and the files are little-endian"
#endif

#define CHUNK 1024     /* elements: what is read twice, is read the second time from the first cache */
#define MAX_SOURCES 32 /* so that a vector of each source fits a thread's stack */
#define BIN_BITS 10    /* of the histograms with which a value is selected */
#define INFINITE 0x7f800000u
#define MAGNITUDE 0x7fffffffu

#define INLINE inline __attribute__((always_inline))

enum dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum keep { KEEP_ALL = 0, KEEP_LARGEST = 1, KEEP_RANDOM = 2 };
enum combine { SUM = 0, AGREEING = 1, AGREEING_NORMALISED = 2 };

/* The caller asks for this first: a library of another version has other functions or other structures. Raise it with
   every change of either. */
#define VERSION 2

/* What a technique does to one tensor. */
typedef struct {
  int32_t sources;
  int32_t base_dtype; /* -1: there is no base, and the sources themselves are merged, not their task vectors */
  int32_t output_dtype;
  int32_t keep;
  int32_t combine;
  uint32_t threshold; /* KEEP_RANDOM: of the 65536 values of an element's bits, how many mean keep */
  float rescale;      /* KEEP_RANDOM: what is kept is divided by it */
  float divisor;      /* the sum is divided by it */
  float scale;        /* the merged task vector is multiplied by it */
} program;

/* What differs between the sources of a tensor. */
typedef struct {
  int32_t dtype;
  float weight;
  uint64_t key;         /* KEEP_RANDOM: of the random bits */
  uint32_t cut;         /* KEEP_LARGEST: bits of the smallest magnitude that is kept */
  uint32_t outlier_cut; /* likewise of the smallest that is dropped again as an outlier; UINT32_MAX: none is */
  int64_t ties;         /* of the elements equal to the cut, how many are kept, from here on */
  int64_t outlier_ties;
} source;

/* Division by a power of two is multiplication by its inverse, to the last bit, and several times as fast. */
typedef struct {
  int is_one, is_power;
  float value, inverse;
} quotient;

static inline quotient quotient_of(float divisor) {
  uint32_t bits;
  memcpy(&bits, &divisor, sizeof bits);
  const uint32_t exponent = bits >> 23; /* with the sign: negative divisors are not looked at closer */
  return (quotient){divisor == 1.0f, (bits & 0x7fffffu) == 0 && exponent >= 1 && exponent <= 253, divisor,
                    1.0f / divisor};
}

static inline size_t bytes_of(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static inline const void *element(const void *data, int32_t dtype, int64_t at) {
  return (const char *)data + at * (int64_t)bytes_of(dtype);
}

/* An address may be any: not every file aligns its tensors. */
typedef uint16_t __attribute__((aligned(1), may_alias)) any_uint16;
typedef uint32_t __attribute__((aligned(1), may_alias)) any_uint32;

/* WIDTH: elements of a vector of float32. A few registers' worth, of which half as many hold what takes 16 bits. */
#if defined(__x86_64__)
#include <immintrin.h>

#define NAME(name) name##_v4
#define WIDTH 32
#define HAS_COMPRESS 1
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,popcnt"))), apply_to = function)
#include "elementwise.h"
#pragma clang attribute pop
#undef HAS_COMPRESS
#undef WIDTH
#undef NAME

#define NAME(name) name##_v3
#define WIDTH 16
#pragma clang attribute push(__attribute__((target("avx2,f16c,popcnt"))), apply_to = function)
#include "elementwise.h"
#pragma clang attribute pop
#undef WIDTH
#undef NAME
#endif

#define NAME(name) name##_v1
#define WIDTH 8
#include "elementwise.h"

int64_t interface(void) {
  return (int64_t)VERSION << 48 | (int64_t)sizeof(program) << 24 | (int64_t)sizeof(source);
}

/* Drops the values that equal one, in place; the others keep their order. Returns how many are left. */
int64_t without(uint32_t *values, int64_t count, uint32_t value) {
  int64_t left = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t each = values[i];
    values[left] = each;
    left += each != value;
  }
  return left;
}

/* Sorts, in place; `spare` has room for as many values. */
void sort(uint32_t *restrict values, uint32_t *restrict spare, int64_t count) {
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t begins[257] = {0};
    for (int64_t i = 0; i < count; i++) begins[((values[i] >> shift) & 0xffu) + 1]++;
    for (int bin = 0; bin < 256; bin++) begins[bin + 1] += begins[bin];
    for (int64_t i = 0; i < count; i++) spare[begins[(values[i] >> shift) & 0xffu]++] = values[i];
    memcpy(values, spare, (size_t)count * sizeof *values);
  }
}
