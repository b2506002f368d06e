/* Included once for each instruction set, with NAME(name) to append its suffix. No include guard on purpose. */

typedef float NAME(floats) __attribute__((ext_vector_type(WIDTH)));
typedef int32_t NAME(ints) __attribute__((ext_vector_type(WIDTH)));
typedef uint32_t NAME(uints) __attribute__((ext_vector_type(WIDTH)));
typedef _Float16 NAME(halves) __attribute__((ext_vector_type(WIDTH)));
typedef int16_t NAME(shorts) __attribute__((ext_vector_type(WIDTH)));
typedef uint16_t NAME(ushorts) __attribute__((ext_vector_type(WIDTH)));
typedef uint64_t NAME(words) __attribute__((ext_vector_type(WIDTH / 4)));
typedef uint32_t NAME(pairs) __attribute__((ext_vector_type(WIDTH / 2)));
typedef _Bool NAME(bools) __attribute__((ext_vector_type(WIDTH)));

#define floats NAME(floats)
#define ints NAME(ints)
#define uints NAME(uints)
#define halves NAME(halves)
#define shorts NAME(shorts)
#define ushorts NAME(ushorts)
#define words NAME(words)
#define pairs NAME(pairs)
#define bools NAME(bools)

/* Whether none of n elements is NaN or infinite. */
static int NAME(finite)(const void *data, int32_t dtype, int64_t n) {
  if (dtype == FLOAT32) {
    const any_uint32 *bits = data;
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = (bits[i] & MAGNITUDE) > largest ? bits[i] & MAGNITUDE : largest;
    return largest < INFINITE;
  }
  const any_uint16 *bits = data;
  uint16_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint16_t magnitude = bits[i] & 0x7fffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < (dtype == FLOAT16 ? 0x7c00u : INFINITE >> 16);
}

/* The largest magnitudes seen so far, as bits: of dtypes of 16 bits and of 32. */
typedef struct {
  ushorts narrow;
  uints wide;
} NAME(largest);

static INLINE void NAME(see_narrow)(NAME(largest) *seen, ushorts bits) {
  seen->narrow = __builtin_elementwise_max(seen->narrow, bits & 0x7fffu);
}

static INLINE void NAME(see_wide)(NAME(largest) *seen, uints bits) {
  seen->wide = __builtin_elementwise_max(seen->wide, bits & MAGNITUDE);
}

/* Whether none that was seen is NaN or infinite. */
static INLINE int NAME(all_finite)(NAME(largest) seen, int32_t dtype) {
  if (dtype == FLOAT32) return __builtin_reduce_max(seen.wide) < INFINITE;
  return __builtin_reduce_max(seen.narrow) < (dtype == FLOAT16 ? 0x7c00u : INFINITE >> 16);
}

/* PAIRED is bfloat16 in another order: the elements at even places, then those at odd ones. A pair is 32 bits, so its
   elements are apart and together again in half as many steps. Where all tensors have it, the order does not matter. */
#define PAIRED 3

static INLINE floats NAME(load)(const void *data, int32_t dtype, NAME(largest) *seen) {
  if (dtype == PAIRED) {
    pairs bits;
    memcpy(&bits, data, sizeof bits);
    if (seen) NAME(see_narrow)(seen, (ushorts)bits);
    uints value;
    value.lo = bits << 16;
    value.hi = bits & 0xffff0000u;
    return (floats)value;
  }
  if (dtype == BFLOAT16) {
    ushorts bits;
    memcpy(&bits, data, sizeof bits);
    if (seen) NAME(see_narrow)(seen, bits);
    return (floats)(__builtin_convertvector(bits, uints) << 16);
  }
  if (dtype == FLOAT16) {
    halves half;
    memcpy(&half, data, sizeof half);
    if (seen) NAME(see_narrow)(seen, (ushorts)half);
    return __builtin_convertvector(half, floats);
  }
  floats value;
  memcpy(&value, data, sizeof value);
  if (seen) NAME(see_wide)(seen, (uints)value);
  return value;
}

/* Rounds to the dtype, to nearest and ties to even. */
static INLINE void NAME(store)(floats value, int32_t dtype, void *data, NAME(largest) *seen) {
  if (dtype == FLOAT32) {
    NAME(see_wide)(seen, (uints)value);
    memcpy(data, &value, sizeof value);
    return;
  }
  ushorts rounded;
  if (dtype == FLOAT16) {
    rounded = (ushorts)__builtin_convertvector(value, halves);
  } else {
    uints bits = (uints)value;
    bits += 0x7fffu + ((bits >> 16) & 1u);
    rounded = dtype == PAIRED ? (ushorts)((bits.lo >> 16) | (bits.hi & 0xffff0000u))
                              : __builtin_convertvector(bits >> 16, ushorts);
  }
  NAME(see_narrow)(seen, rounded);
  memcpy(data, &rounded, sizeof rounded);
}

/* The magnitudes of WIDTH elements of a task vector, as bits. */
static INLINE void NAME(magnitude)(const void *base, int32_t base_dtype, const void *data, int32_t dtype, uint32_t *to) {
  const floats delta = NAME(load)(data, dtype, NULL) - NAME(load)(base, base_dtype, NULL);
  const uints bits = (uints)delta & MAGNITUDE;
  memcpy(to, &bits, sizeof bits);
}

static INLINE void NAME(magnitudes_of)(const void *base, int32_t base_dtype, const void *data, int32_t dtype, int n,
                                       uint32_t *to) {
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH)
    NAME(magnitude)(element(base, base_dtype, i), base_dtype, element(data, dtype, i), dtype, to + i);
  if (i < n) { /* the last elements, filled up with zeros */
    uint32_t filled[WIDTH] = {0}, filled_base[WIDTH] = {0};
    memcpy(filled, element(data, dtype, i), (size_t)(n - i) * bytes_of(dtype));
    memcpy(filled_base, element(base, base_dtype, i), (size_t)(n - i) * bytes_of(base_dtype));
    NAME(magnitude)(filled_base, base_dtype, filled, dtype, to + i);
  }
}

/* Those of n elements, at most CHUNK, from `at`, in their order. Writes up to WIDTH more. */
static void NAME(magnitudes)(const void *base, int32_t base_dtype, const void *data, int32_t dtype, int64_t at, int n,
                             uint32_t *to) {
  base = element(base, base_dtype, at);
  data = element(data, dtype, at);
  if (base_dtype == BFLOAT16 && dtype == BFLOAT16)
    NAME(magnitudes_of)(base, BFLOAT16, data, BFLOAT16, n, to);
  else if (base_dtype == FLOAT32 && dtype == FLOAT32)
    NAME(magnitudes_of)(base, FLOAT32, data, FLOAT32, n, to);
  else
    NAME(magnitudes_of)(base, base_dtype, data, dtype, n, to);
}

/* Counts the magnitudes above and equal to a value. */
static void NAME(compare)(const uint32_t *values, int64_t count, uint32_t value, int64_t *above, int64_t *equal) {
  for (int64_t at = 0; at < count; at += CHUNK) {
    const int n = (int)(count - at < CHUNK ? count - at : CHUNK);
    uint32_t more = 0, same = 0;
    for (int i = 0; i < n; i++) {
      more += values[at + i] > value;
      same += values[at + i] == value;
    }
    *above += more;
    *equal += same;
  }
}

/* Which elements of the groups of four from `group` on are kept: the random bits of automerge.merging.random. */
static INLINE ints NAME(drawn)(uint64_t key, uint64_t group, uint32_t threshold, int32_t dtype) {
  words word;
  for (int i = 0; i < WIDTH / 4; i++) word[i] = (uint64_t)(i + 1) * 0x9E3779B97F4A7C15u;
  word += key + group * 0x9E3779B97F4A7C15u;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  word ^= word >> 31;
  if (dtype == PAIRED) {
    uints lanes;
    lanes.lo = (pairs)word & 0xffffu;
    lanes.hi = (pairs)word >> 16;
    return (ints)lanes < (int32_t)threshold;
  }
  /* 16 bits hold the largest number below a threshold of 65536. */
  const shorts mask = (ushorts)word <= (uint16_t)(threshold - 1);
  return threshold == 0 ? (ints)0 : __builtin_convertvector(mask, ints);
}

static INLINE floats NAME(divide)(floats value, quotient by) {
  return by.is_power ? value * by.inverse : value / by.value;
}

/* What the loops below need beside the program and its sources. */
typedef struct {
  const void *base, *const *data;
  void *output;
  uint64_t index; /* of the first element */
  int64_t count;  /* a multiple of WIDTH */
  ints below[MAX_SOURCES], below_outliers[MAX_SOURCES]; /* what is larger than this is kept, and dropped again */
  uint8_t not_finite[MAX_SOURCES + 2]; /* the sources, the base, the output */
} NAME(run);

/* The first arguments are constants wherever this is inlined, so that the compiler makes a loop of its own for each case,
   in which all values stay in registers. A dtype is that of all tensors; -1: each has its own. */
static INLINE void NAME(merge_vectors)(const int32_t dtype, const int sources, const int keep, const int agreeing,
                                       const program *plan, const source *of, NAME(run) *run) {
  const int has_base = plan->base_dtype >= 0, normalised = plan->combine == AGREEING_NORMALISED;
  const int32_t base_dtype = dtype < 0 ? plan->base_dtype : dtype, output_dtype = dtype < 0 ? plan->output_dtype : dtype;
  const uint32_t threshold = plan->threshold;
  const quotient rescale = quotient_of(plan->rescale), divisor = quotient_of(plan->divisor);
  const float scale = plan->scale;
  const uint64_t index = run->index;
  const int64_t count = run->count;
  const char *const base = run->base;
  char *const output = run->output;
  const char *data[MAX_SOURCES];
  /* A plain sum is NaN or infinite if a term of it is: it is enough to look at that. */
  const int checked = keep != KEEP_ALL || agreeing || dtype < 0;
  NAME(largest) seen[MAX_SOURCES + 1], seen_output = {0};
  for (int s = 0; s <= sources; s++) seen[s] = (NAME(largest)){0};
  for (int s = 0; s < sources; s++) data[s] = run->data[s];

  for (int64_t at = 0; at < count; at += WIDTH) {
    floats common = 0.0f, total = 0.0f, each[MAX_SOURCES];
    if (has_base) common = NAME(load)(element(base, base_dtype, at), base_dtype, checked ? &seen[sources] : NULL);
#pragma clang loop unroll(full)
    for (int s = 0; s < sources; s++) {
      const int32_t source_dtype = dtype < 0 ? of[s].dtype : dtype;
      floats value = NAME(load)(element(data[s], source_dtype, at), source_dtype, checked ? &seen[s] : NULL);
      if (has_base) value -= common;
      if (keep == KEEP_LARGEST) {
        const ints magnitudes = (ints)value & (int32_t)MAGNITUDE;
        ints mask = magnitudes > run->below[s];
        if (of[s].outlier_cut != UINT32_MAX) mask &= ~(magnitudes > run->below_outliers[s]);
        value = (floats)((ints)value & mask);
      } else if (keep == KEEP_RANDOM) {
        const ints mask = NAME(drawn)(of[s].key, (index + (uint64_t)at) / 4, threshold, dtype);
        value = NAME(divide)((floats)((ints)value & mask), rescale);
      }
      each[s] = value * of[s].weight;
      total = s == 0 ? each[s] : total + each[s];
    }
    if (agreeing) {
      /* With the elected sign flipped away, what agrees is positive. */
      const ints flip = ~(total >= 0.0f) & INT32_MIN;
      floats agreed = 0.0f;
#pragma clang loop unroll(full)
      for (int s = 0; s < sources; s++) {
        const ints agrees = (floats)((ints)each[s] ^ flip) > 0.0f;
        const floats nothing = 0.0f, weight = of[s].weight;
        total = s == 0 ? (agrees ? each[s] : nothing) : (agrees ? total + each[s] : total);
        if (normalised) agreed = s == 0 ? (agrees ? weight : nothing) : (agrees ? agreed + weight : agreed);
      }
      if (normalised) total /= agreed == 0.0f ? (floats)1.0f : agreed;
    }
    if (!divisor.is_one) total = NAME(divide)(total, divisor);
    if (scale != 1.0f) total *= scale;
    if (has_base) total = common + total;
    NAME(store)(total, output_dtype, (void *)element(output, output_dtype, at), &seen_output);
  }
  if (checked) {
    if (has_base) run->not_finite[sources] |= !NAME(all_finite)(seen[sources], base_dtype);
    for (int s = 0; s < sources; s++)
      run->not_finite[s] |= !NAME(all_finite)(seen[s], dtype < 0 ? of[s].dtype : dtype);
  }
  run->not_finite[sources + 1] |= !NAME(all_finite)(seen_output, output_dtype);
}

static INLINE void NAME(merge_kept)(const int32_t dtype, const int sources, const int keep, const program *plan,
                                    const source *of, NAME(run) *run) {
  if (plan->combine == SUM)
    NAME(merge_vectors)(dtype, sources, keep, 0, plan, of, run);
  else
    NAME(merge_vectors)(dtype, sources, keep, 1, plan, of, run);
}

static INLINE void NAME(merge_sources)(const int32_t dtype, const int sources, const program *plan, const source *of,
                                       NAME(run) *run) {
  if (plan->keep == KEEP_LARGEST)
    NAME(merge_kept)(dtype, sources, KEEP_LARGEST, plan, of, run);
  else if (plan->keep == KEEP_RANDOM)
    NAME(merge_kept)(dtype, sources, KEEP_RANDOM, plan, of, run);
  else
    NAME(merge_kept)(dtype, sources, KEEP_ALL, plan, of, run);
}

static INLINE void NAME(merge_dtype)(const int32_t dtype, const program *plan, const source *of, NAME(run) *run) {
  if (plan->sources == 2)
    NAME(merge_sources)(dtype, 2, plan, of, run);
  else if (plan->sources == 3)
    NAME(merge_sources)(dtype, 3, plan, of, run);
  else
    NAME(merge_sources)(dtype, plan->sources, plan, of, run);
}

static void NAME(merge_run)(const int32_t dtype, const program *plan, const source *of, NAME(run) *run) {
  if (dtype == PAIRED)
    NAME(merge_dtype)(PAIRED, plan, of, run);
  else if (dtype == FLOAT32)
    NAME(merge_dtype)(FLOAT32, plan, of, run);
  else
    NAME(merge_dtype)(-1, plan, of, run);
}

/* The index of an element before which those equal to the cut are kept, and none from it on. Uses up their ties. */
static int64_t NAME(end_of_ties)(const void *base, int32_t base_dtype, const void *data, int32_t dtype, int64_t count,
                                 uint32_t cut, int64_t *ties) {
  uint32_t magnitudes[CHUNK + WIDTH];
  int64_t at = 0;
  for (; at < count && *ties > 0; at += CHUNK) {
    const int n = (int)(count - at < CHUNK ? count - at : CHUNK);
    int64_t above = 0, equal = 0;
    NAME(magnitudes)(base, base_dtype, data, dtype, at, n, magnitudes);
    NAME(compare)(magnitudes, n, cut, &above, &equal);
    if (equal > *ties) {
      int i = 0;
      while (magnitudes[i] != cut || (*ties)-- > 0) i++;
      *ties = 0;
      return at + i;
    }
    *ties -= equal;
  }
  return at < count ? at : count;
}

/* What WIDTH elements must be larger than, of which the first `tied` need only reach the cut. */
static INLINE ints NAME(below)(uint32_t cut, int64_t tied, int32_t dtype) {
  ints below;
  for (int i = 0; i < WIDTH; i++) {
    const int place = dtype != PAIRED ? i : i < WIDTH / 2 ? 2 * i : 2 * (i - WIDTH / 2) + 1;
    below[i] = (int32_t)(cut < MAGNITUDE ? cut : MAGNITUDE) - (place < tied);
  }
  return below;
}

/* Merges `count` elements. `index`, a multiple of 4, is that of the first within the whole tensor; the pointers point at
   it. `not_finite`, one for each source and then one for the base, is set where an input has NaN or infinite elements.
   The ties of the sources are used up as they are met. Returns whether an element of the result does not fit. */
int NAME(merge)(const program *plan, source *sources, const void *base, const void *const *data, int64_t index,
                int64_t count, void *output, uint8_t *not_finite) {
  const int n = plan->sources, has_base = plan->base_dtype >= 0;
  int uniform = !has_base || plan->base_dtype == plan->output_dtype;
  for (int s = 0; s < n; s++) uniform &= sources[s].dtype == plan->output_dtype;
  const int32_t dtype = !uniform || plan->output_dtype == FLOAT16 ? -1 : plan->output_dtype == BFLOAT16 ? PAIRED : FLOAT32;
  NAME(run) run;
  memset(run.not_finite, 0, sizeof run.not_finite);

  int64_t ends[2 * MAX_SOURCES]; /* of the ties of the sources, then of those of their outliers */
  const int cuts = plan->keep == KEEP_LARGEST ? 2 * n : 0;
  for (int i = 0; i < cuts; i++) {
    source *of = &sources[i % n];
    const uint32_t cut = i < n ? of->cut : of->outlier_cut;
    int64_t *ties = i < n ? &of->ties : &of->outlier_ties;
    /* Where all are kept, or there is no such cut, there is nothing to count. */
    ends[i] = *ties == INT64_MAX || cut > MAGNITUDE
                  ? count
                  : NAME(end_of_ties)(base, plan->base_dtype, data[i % n], of->dtype, count, cut, ties);
  }

  /* The cuts are the same for all vectors of a run. */
  for (int64_t at = 0, length; at < count; at += length) {
    const void *run_data[MAX_SOURCES];
    float filled[MAX_SOURCES + 1][WIDTH], merged[WIDTH];
    int64_t next = count;
    for (int i = 0; i < cuts; i++) next = ends[i] > at && ends[i] < next ? ends[i] : next;
    length = next - at < WIDTH ? WIDTH : (next - at) - (next - at) % WIDTH;
    run.index = (uint64_t)(index + at);
    run.count = length;
    run.data = run_data;
    run.base = has_base ? element(base, plan->base_dtype, at) : NULL;
    run.output = (void *)element(output, plan->output_dtype, at);
    for (int s = 0; s < n; s++) run_data[s] = element(data[s], sources[s].dtype, at);
    for (int s = 0; s < cuts / 2; s++) {
      run.below[s] = NAME(below)(sources[s].cut, ends[s] - at, dtype);
      run.below_outliers[s] = NAME(below)(sources[s].outlier_cut, ends[n + s] - at, dtype);
    }
    const size_t rest = (size_t)(count - at);
    const int is_last = count - at < WIDTH; /* then it is filled up with zeros */
    if (is_last) {
      memset(filled, 0, sizeof filled);
      if (has_base) run.base = memcpy(filled[n], run.base, rest * bytes_of(plan->base_dtype));
      for (int s = 0; s < n; s++) run_data[s] = memcpy(filled[s], run_data[s], rest * bytes_of(sources[s].dtype));
      run.output = merged;
    }
    NAME(merge_run)(dtype, plan, sources, &run);
    if (is_last) memcpy((void *)element(output, plan->output_dtype, at), merged, rest * bytes_of(plan->output_dtype));
  }

  if (run.not_finite[n + 1]) { /* rarely: is it an input's fault? */
    if (has_base) run.not_finite[n] |= !NAME(finite)(base, plan->base_dtype, count);
    for (int s = 0; s < n; s++) run.not_finite[s] |= !NAME(finite)(data[s], sources[s].dtype, count);
  }
  memcpy(not_finite, run.not_finite, (size_t)n + 1);
  return run.not_finite[n + 1];
}

/* Puts those of n values that lie from `low` to `high` into `found`, which has room for n. Returns how many. */
static int NAME(inside)(const uint32_t *values, int n, uint32_t low, uint32_t high, uint32_t *found) {
  int used = 0, i = 0;
#ifdef HAS_COMPRESS
  for (; i + 16 <= n; i += 16) {
    const __m512i value = _mm512_loadu_si512(values + i);
    const __mmask16 inside = _mm512_cmple_epu32_mask(_mm512_sub_epi32(value, _mm512_set1_epi32((int)low)),
                                                     _mm512_set1_epi32((int)(high - low)));
    _mm512_storeu_si512(found + used, _mm512_maskz_compress_epi32(inside, value));
    used += __builtin_popcount(inside);
  }
#else
  for (; i + WIDTH <= n; i += WIDTH) { /* few are, mostly */
    uints value;
    memcpy(&value, values + i, sizeof value);
    const bools each = __builtin_convertvector(value - low <= (uints)(high - low), bools);
    uint32_t inside = 0;
    memcpy(&inside, &each, WIDTH / 8);
    for (; inside != 0; inside &= inside - 1) found[used++] = values[i + __builtin_ctz(inside)];
  }
#endif
  for (; i < n; i++)
    if (values[i] - low <= high - low) found[used++] = values[i];
  return used;
}

/* Of the magnitudes of `count` elements of a task vector, counts those above `high`, and puts those from `low` to `high`
   into `found`, in their order. Returns how many these are, or -1 where `room`, which is CHUNK more than may be found,
   does not suffice. */
int64_t NAME(collect)(const void *base, int32_t base_dtype, const void *data, int32_t dtype, int64_t count, uint32_t low,
                      uint32_t high, int64_t *above, uint32_t *found, int64_t room) {
  uint32_t magnitudes[CHUNK + WIDTH];
  int64_t used = 0;
  for (int64_t at = 0; at < count; at += CHUNK) {
    const int n = (int)(count - at < CHUNK ? count - at : CHUNK);
    if (room - used < CHUNK) return -1;
    NAME(magnitudes)(base, base_dtype, data, dtype, at, n, magnitudes);
    uint32_t more = 0;
    for (int i = 0; i < n; i++) more += magnitudes[i] > high;
    *above += more;
    used += NAME(inside)(magnitudes, n, low, high, found + used);
  }
  return used;
}

/* Adds the magnitudes of `count` elements of a task vector to a histogram of 65536 bins: by their upper 16 bits, or, of
   those whose upper 16 bits are `upper` (if not negative), by their lower 16 bits. */
void NAME(histogram)(const void *base, int32_t base_dtype, const void *data, int32_t dtype, int64_t count, int32_t upper,
                     int64_t *bins) {
  uint32_t magnitudes[CHUNK + WIDTH];
  for (int64_t at = 0; at < count; at += CHUNK) {
    const int n = (int)(count - at < CHUNK ? count - at : CHUNK);
    NAME(magnitudes)(base, base_dtype, data, dtype, at, n, magnitudes);
    if (upper < 0)
      for (int i = 0; i < n; i++) bins[magnitudes[i] >> 16]++;
    else
      for (int i = 0; i < n; i++)
        if ((int32_t)(magnitudes[i] >> 16) == upper) bins[magnitudes[i] & 0xffffu]++;
  }
}

/* How many magnitudes of `count` elements of a task vector are above a value, and how many equal it. */
void NAME(count)(const void *base, int32_t base_dtype, const void *data, int32_t dtype, int64_t count, uint32_t value,
                 int64_t *above, int64_t *equal) {
  uint32_t magnitudes[CHUNK + WIDTH];
  *above = *equal = 0;
  for (int64_t at = 0; at < count; at += CHUNK) {
    const int n = (int)(count - at < CHUNK ? count - at : CHUNK);
    NAME(magnitudes)(base, base_dtype, data, dtype, at, n, magnitudes);
    NAME(compare)(magnitudes, n, value, above, equal);
  }
}

/* How many of `count` values are above one, and how many equal it. */
void NAME(tally)(const uint32_t *values, int64_t count, uint32_t value, int64_t *above, int64_t *equal) {
  *above = *equal = 0;
  NAME(compare)(values, count, value, above, equal);
}

/* The value of rank `rank` (0 is the largest) among `count` values, which stay as they are. The values are often close
   to each other, so the bins divide what lies between the smallest and the largest. */
uint32_t NAME(select)(const uint32_t *values, int64_t count, int64_t rank) {
  uint32_t low = UINT32_MAX, high = 0;
  for (int64_t i = 0; i < count; i++) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  while (low < high) {
    int64_t bins[1 << BIN_BITS] = {0};
    const int bits = 32 - __builtin_clz(high - low), shift = bits > BIN_BITS ? bits - BIN_BITS : 0;
    for (int64_t i = 0; i < count; i++)
      if (values[i] - low <= high - low) bins[(values[i] - low) >> shift]++;
    uint32_t bin = (high - low) >> shift;
    while (rank >= bins[bin]) rank -= bins[bin--];
    low += bin << shift;
    high = high - low < (1u << shift) ? high : low + ((1u << shift) - 1);
  }
  return low;
}

#undef PAIRED
#undef floats
#undef ints
#undef uints
#undef halves
#undef shorts
#undef ushorts
#undef words
#undef pairs
#undef bools
