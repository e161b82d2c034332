/* Each vector's best partner in other matrices, on processors with AMX. native.py compiles and calls it.

   A matrix of m vectors of n coordinates is packed as unit vectors in bfloat16, in tiles of 16 vectors by 32 coordinates
   padded with zeros: 16 pairs of coordinates, and of each the pairs of 16 vectors. That is how AMX takes the right-hand
   matrix of a product; the left-hand one is transposed tile by tile in each call.

   Products are taken in blocks of 32 by 32, whose maxima are found while they are in the nearest cache. A maximum and its
   place are one integer: the bits of a non-negative float are ordered like the float, and the lowest five make room for
   the place. The cosines with the partners found are then computed in float32.

   The work is cut the same way whatever the number of threads, and so are the results. No memory is allocated here. */

#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    TILE = 512,                 /* numbers in a tile */
    ROWS = 256, COLUMNS = 512,  /* vectors of either side that are searched at a time, in the second cache */
    DEPTH = 288,                /* coordinates of them at a time, so that a row of tiles stays in the first */
    FEW = 64,                   /* vectors whose exact cosines are one piece of work */
    MAX_THREADS = 256,
};
enum { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
    const void *values;   /* coordinate k of vector v is values[v * step + k * stride]; one of the two is 1 */
    int64_t step, stride, dtype, vectors, length;
    const float *scale;   /* [vectors]: one over the norm */
    uint16_t *packed;     /* [vectors / 16, length / 32, TILE], of vectors rounded up to a multiple of 32 */
} Matrix;

typedef struct {
    const Matrix *y;
    float *best_x, *best_y;      /* [x.vectors], [y.vectors]: the results */
    uint32_t *value_x, *value_y; /* what the search found: [x.vectors], [chunks of ROWS of x, padded y.vectors] */
    int32_t *place_x, *place_y;  /* and where */
} Pair;

typedef struct {
    const Matrix *x;
    const Pair *pairs;
    int64_t count, chunks, shares; /* of x for the search; of either side for the cosines */
    uint16_t *left;  /* as x->packed, for the left side of products */
    float *scratch;  /* [threads, ROWS * COLUMNS] */
    void (*piece)(const void *, int64_t, float *);
    int64_t pieces;
    atomic_long next, thread;
} Work;

static int64_t padded(int64_t vectors) { return (vectors + 31) / 32 * 32; }
static int64_t deep(const Matrix *m) { return (m->length + 31) / 32; }
static __m512i each_sixteenth(void) { /* 0, 16, 32, … */
    return _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
}

/* Threads */

static void *take_pieces(void *argument) {
    Work *w = argument;
    float *scratch = w->scratch + atomic_fetch_add(&w->thread, 1) * ROWS * COLUMNS;
    for (int64_t piece; (piece = atomic_fetch_add(&w->next, 1)) < w->pieces;) w->piece(w, piece, scratch);
    return NULL;
}

/* If the system gives fewer threads, those that there are do it all. */
static void share(Work *w, void (*piece)(const void *, int64_t, float *), int64_t pieces, int64_t threads) {
    pthread_t others[MAX_THREADS];
    int started = 1;
    w->piece = piece, w->pieces = pieces;
    atomic_store(&w->next, 0), atomic_store(&w->thread, 0);
    if (threads > pieces) threads = pieces;
    while (started < threads && started < MAX_THREADS && !pthread_create(&others[started], NULL, take_pieces, w)) started++;
    take_pieces(w);
    while (--started) pthread_join(others[started], NULL);
}

/* Reading and packing */

static inline __m512 widen(__m256i half, int64_t dtype) {
    if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __m512 load(const void *values, int64_t at, int64_t dtype) { /* sixteen neighbours */
    if (dtype == FLOAT32) return _mm512_loadu_ps((const float *)values + at);
    return widen(_mm256_loadu_si256((const __m256i *)((const uint16_t *)values + at)), dtype);
}

static inline __m512 load_some(const void *values, int64_t at, int64_t dtype, int64_t count) { /* the first few of them */
    if (count <= 0) return _mm512_setzero_ps();
    __mmask16 some = count >= 16 ? 0xFFFF : (1u << count) - 1;
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(some, (const float *)values + at);
    return widen(_mm256_maskz_loadu_epi16(some, (const uint16_t *)values + at), dtype);
}

static void pack(const void *work, int64_t group, float *scratch) {
    const Matrix *m = ((const Work *)work)->x;
    int64_t tiles = deep(m), first = group * 16, count = m->vectors - first < 16 ? m->vectors - first : 16;
    uint32_t *to = (uint32_t *)(m->packed + group * tiles * TILE);
    memset(to, 0, tiles * TILE * sizeof(uint16_t));
    if (m->stride == 1) {
        for (int64_t v = first; v < first + count; v++)
            for (int64_t k = 0; k < m->length; k += 32) {
                __m512 scale = _mm512_set1_ps(m->scale[v]);
                __m512 low = load_some(m->values, v * m->step + k, m->dtype, m->length - k);
                __m512 high = load_some(m->values, v * m->step + k + 16, m->dtype, m->length - k - 16);
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(scale, high), _mm512_mul_ps(scale, low));
                _mm512_i32scatter_epi32(to + k * 16 / 2 + (v - first), each_sixteenth(), both, 4);
            }
        return;
    }
    __m512 scale = load_some(m->scale, first, FLOAT32, count);
    for (int64_t k = 0; k < m->length; k += 2) {
        __m512i pair[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int64_t part = 0; part < 2 && k + part < m->length; part++) {
            __m512 values = load_some(m->values, first + (k + part) * m->stride, m->dtype, count);
            pair[part] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(scale, values)));
        }
        _mm512_storeu_si512(to + k * 16 / 2, _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
    }
}

static void transpose(const void *work, int64_t group, float *scratch) {
    const Work *w = work;
    for (int64_t tile = group * deep(w->x); tile < (group + 1) * deep(w->x); tile++)
        for (int pair = 0; pair < 16; pair++) {
            __m512i vectors = _mm512_loadu_si512(w->x->packed + tile * TILE + pair * 32);
            _mm512_i32scatter_epi32((uint32_t *)(w->left + tile * TILE) + pair, each_sixteenth(), vectors, 4);
        }
}

/* The search */

/* Products of 32 by 32 vectors over `depth` tiles, added to `c` unless they are the first. */
static inline void multiply(const uint16_t *a, const uint16_t *b, int64_t below, int64_t depth, float *c, int first) {
    if (first) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        _tile_loadd(0, c, 128); _tile_loadd(1, c + 16, 128); _tile_loadd(2, c + 512, 128); _tile_loadd(3, c + 528, 128);
    }
    for (int64_t k = 0; k < depth; k++, a += TILE, b += TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + below, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + below, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 128); _tile_stored(1, c + 16, 128); _tile_stored(2, c + 512, 128); _tile_stored(3, c + 528, 128);
}

/* Maxima of a block: of its rows (`group`: number of its first 16 columns), and of its columns (`first`: of its rows). */
static inline void maxima(const float *c, int group, __m512i *by_row, int32_t first, uint32_t *value, int32_t *place) {
    const __m512i keep = _mm512_set1_epi32(0x7FFFFFE0);
    __m512i group0 = _mm512_set1_epi32(group), group1 = _mm512_set1_epi32(group + 1);
    __m512i down[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int r = 0; r < 32; r++) {
        __m512i row = _mm512_set1_epi32(r), left = _mm512_loadu_si512(c + r * 32), right = _mm512_loadu_si512(c + r * 32 + 16);
        /* 0xEA: (product & keep) | place */
        __m512i a = _mm512_ternarylogic_epi32(left, keep, group0, 0xEA), b = _mm512_ternarylogic_epi32(right, keep, group1, 0xEA);
        by_row[r] = _mm512_max_epu32(by_row[r], _mm512_max_epu32(a, b));
        down[0] = _mm512_max_epu32(down[0], _mm512_ternarylogic_epi32(left, keep, row, 0xEA));
        down[1] = _mm512_max_epu32(down[1], _mm512_ternarylogic_epi32(right, keep, row, 0xEA));
    }
    for (int half = 0; half < 2; half++, value += 16, place += 16) {
        __m512i found = _mm512_and_si512(down[half], keep), row = _mm512_and_si512(down[half], _mm512_set1_epi32(31));
        __mmask16 more = _mm512_cmpgt_epu32_mask(found, _mm512_loadu_si512(value));
        _mm512_mask_storeu_epi32(value, more, found);
        _mm512_mask_storeu_epi32(place, more, _mm512_add_epi32(row, _mm512_set1_epi32(first)));
    }
}

static void configure_tiles(void) {
    struct { uint8_t palette, other[15]; uint16_t bytes[16]; uint8_t rows[16]; } __attribute__((packed)) shape = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64, shape.rows[tile] = 16;
    __asm__ volatile("" ::"r"(&shape) : "memory"); /* some compilers believe that only its first bytes are read */
    _tile_loadconfig(&shape);
}

/* The partners of ROWS vectors of x in one y, and what these vectors are for those of y. */
static void search(const void *work, int64_t piece, float *scratch) {
    const Work *w = work;
    const Pair *pair = &w->pairs[piece / w->chunks];
    const Matrix *x = w->x, *y = pair->y;
    int64_t tiles = deep(x), below = tiles * TILE, width = padded(y->vectors), chunk = piece % w->chunks;
    int64_t passes = (tiles * 32 + DEPTH - 1) / DEPTH, depth = (tiles + passes - 1) / passes;
    int64_t top = chunk * ROWS, end = padded(x->vectors) < top + ROWS ? padded(x->vectors) : top + ROWS;
    uint32_t *value_y = pair->value_y + chunk * width;
    int32_t *place_y = pair->place_y + chunk * width;
    __m512i by_row[ROWS];
    memset(value_y, 0, width * sizeof *value_y);
    memset(place_y, 0, width * sizeof *place_y);
    configure_tiles();
    for (int64_t left = 0; left < width; left += COLUMNS) {
        int64_t right = left + COLUMNS < width ? left + COLUMNS : width;
        memset(by_row, 0, sizeof by_row);
        for (int64_t k = 0; k < tiles; k += depth)
            for (int64_t r = top; r < end; r += 32)
                for (int64_t j = left; j < right; j += 32) {
                    int64_t now = tiles - k < depth ? tiles - k : depth;
                    float *c = passes == 1 ? scratch : scratch + (r - top) * COLUMNS + (j - left) * 32;
                    multiply(w->left + r / 16 * below + k * TILE, y->packed + j / 16 * below + k * TILE, below, now, c, !k);
                    if (k + now == tiles) maxima(c, (j - left) / 16, by_row + (r - top), r, value_y + j, place_y + j);
                }
        for (int64_t r = top; r < end && r < x->vectors; r++) {
            uint32_t most = _mm512_reduce_max_epu32(by_row[r - top]);
            if (left && (most & ~31u) <= pair->value_x[r]) continue;
            int lane = __builtin_ctz(_mm512_cmpeq_epu32_mask(by_row[r - top], _mm512_set1_epi32(most)));
            int64_t place = left + (most & 31) * 16 + lane;
            pair->value_x[r] = most & ~31u;
            pair->place_x[r] = place < y->vectors ? place : y->vectors - 1; /* padding wins only against zeros */
        }
    }
    _tile_release();
}

/* The cosines */

static inline float vector_product(const Matrix *x, int64_t x_dtype, int64_t i, const Matrix *y, int64_t y_dtype, int64_t j) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 scale_x = _mm512_set1_ps(x->scale[i]), scale_y = _mm512_set1_ps(y->scale[j]);
    int64_t a = i * x->step, b = j * y->step, n = x->length, k = 0;
    for (; k + 64 <= n; k += 64)
        for (int part = 0; part < 4; part++) {
            __m512 u = _mm512_mul_ps(scale_x, load(x->values, a + k + part * 16, x_dtype));
            __m512 v = _mm512_mul_ps(scale_y, load(y->values, b + k + part * 16, y_dtype));
            sums[part] = _mm512_fmadd_ps(u, v, sums[part]);
        }
    for (; k < n; k += 16) {
        __m512 u = _mm512_mul_ps(scale_x, load_some(x->values, a + k, x_dtype, n - k));
        __m512 v = _mm512_mul_ps(scale_y, load_some(y->values, b + k, y_dtype, n - k));
        sums[0] = _mm512_fmadd_ps(u, v, sums[0]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

static float cosine(const Matrix *x, int64_t i, const Matrix *y, int64_t j) {
    float found;
    if (x->dtype == FLOAT32 && y->dtype == FLOAT32) found = vector_product(x, FLOAT32, i, y, FLOAT32, j);
    else if (x->dtype == BFLOAT16 && y->dtype == BFLOAT16) found = vector_product(x, BFLOAT16, i, y, BFLOAT16, j);
    else found = vector_product(x, x->dtype, i, y, y->dtype, j);
    return __builtin_fabsf(found);
}

/* One coordinate of sixteen vectors. */
static inline __m512 gather(const Matrix *m, __m512i vectors, int64_t k) {
    __m512i at = _mm512_mullo_epi32(vectors, _mm512_set1_epi32(m->step));
    if (m->dtype == FLOAT32) return _mm512_i32gather_ps(at, (const float *)m->values + k * m->stride, 4);
    if (!k) { /* below, the number before is read as well, and here there may be none */
        int32_t places[16];
        uint16_t found[16];
        _mm512_storeu_si512(places, at);
        for (int lane = 0; lane < 16; lane++) found[lane] = ((const uint16_t *)m->values)[places[lane]];
        return widen(_mm256_loadu_si256((const __m256i *)found), m->dtype);
    }
    __m512i two = _mm512_i32gather_epi32(at, (const uint16_t *)m->values + k * m->stride - 1, 2);
    return widen(_mm512_cvtepi32_epi16(_mm512_srli_epi32(two, 16)), m->dtype);
}

/* The same for sixteen pairs of vectors whose coordinates are not neighbours in memory; fewer are filled up. */
static void cosines(const Matrix *x, __m512i i, const Matrix *y, __m512i j, float *to, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    __m512 scale_x = _mm512_i32gather_ps(i, x->scale, 4), scale_y = _mm512_i32gather_ps(j, y->scale, 4);
    for (int64_t k = 0; k < x->length;) {
        __m512 part = _mm512_setzero_ps(); /* many numbers added one by one to a large one would round it too often */
        for (int64_t end = k + 64 < x->length ? k + 64 : x->length; k < end; k++)
            part = _mm512_fmadd_ps(_mm512_mul_ps(scale_x, gather(x, i, k)), _mm512_mul_ps(scale_y, gather(y, j, k)), part);
        sum = _mm512_add_ps(sum, part);
    }
    _mm512_mask_storeu_ps(to, count >= 16 ? 0xFFFF : (1u << count) - 1, _mm512_abs_ps(sum));
}

static void by_gathering(const Matrix *x, const Matrix *y, const int32_t *places, int64_t first, int64_t end, float *best) {
    for (int64_t i = first; i < end; i += 16) {
        __mmask16 some = end - i >= 16 ? 0xFFFF : (1u << (end - i)) - 1;
        __m512i lanes = _mm512_srli_epi32(each_sixteenth(), 4);
        cosines(x, _mm512_maskz_add_epi32(some, lanes, _mm512_set1_epi32(i)), y, _mm512_maskz_loadu_epi32(some, places + i), best + i, end - i);
    }
}

static void finish_x(const void *work, int64_t piece, float *scratch) {
    const Work *w = work;
    const Pair *pair = &w->pairs[piece % w->count]; /* the same vectors of x for one pair after the other */
    const Matrix *x = w->x, *y = pair->y;
    int64_t first = piece / w->count * FEW, end = first + FEW < x->vectors ? first + FEW : x->vectors;
    if (x->stride != 1 || y->stride != 1) {
        by_gathering(x, y, pair->place_x, first, end, pair->best_x);
        return;
    }
    for (int64_t i = first; i < end; i++) pair->best_x[i] = cosine(x, i, y, pair->place_x[i]);
}

static void finish_y(const void *work, int64_t piece, float *scratch) {
    const Work *w = work;
    const Pair *pair = &w->pairs[piece / w->shares];
    const Matrix *x = w->x, *y = pair->y;
    int64_t first = piece % w->shares * FEW, end = first + FEW < y->vectors ? first + FEW : y->vectors;
    for (int64_t j = first; j < end; j++) {
        for (int64_t chunk = 1; chunk < w->chunks; chunk++) {
            int64_t at = chunk * padded(y->vectors) + j;
            if (pair->value_y[at] <= pair->value_y[j]) continue;
            pair->value_y[j] = pair->value_y[at];
            pair->place_y[j] = pair->place_y[at];
        }
        if (pair->place_y[j] >= x->vectors) pair->place_y[j] = x->vectors - 1;
    }
    if (x->stride != 1 || y->stride != 1) {
        by_gathering(y, x, pair->place_y, first, end, pair->best_y);
        return;
    }
    for (int64_t j = first; j < end; j++) {
        int64_t i = pair->place_y[j];
        pair->best_y[j] = pair->place_x[i] == j ? pair->best_x[i] : cosine(x, i, y, j); /* or they chose each other */
    }
}

/* What native.py calls */

/* Asks Linux for the use of the tiles; 0 when granted. */
int hf_layerprobe_start(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }

int64_t hf_layerprobe_scratch(void) { return ROWS * COLUMNS; }
int64_t hf_layerprobe_chunks(int64_t vectors) { return (padded(vectors) + ROWS - 1) / ROWS; }

void hf_layerprobe_pack(const Matrix *m, int64_t threads) {
    Work w = {.x = m};
    /* The second 16 of the last 32 may be padding altogether. */
    int64_t groups = (m->vectors + 15) / 16;
    memset(m->packed + groups * deep(m) * TILE, 0, (padded(m->vectors) / 16 - groups) * deep(m) * TILE * sizeof(uint16_t));
    share(&w, pack, groups, threads);
}

void hf_layerprobe_match(const Matrix *x, const Pair *pairs, int64_t count, uint16_t *left, float *scratch, int64_t threads) {
    Work w = {.x = x, .pairs = pairs, .count = count, .chunks = hf_layerprobe_chunks(x->vectors), .left = left, .scratch = scratch};
    int64_t most = 0;
    for (int64_t p = 0; p < count; p++) most = pairs[p].y->vectors > most ? pairs[p].y->vectors : most;
    share(&w, transpose, padded(x->vectors) / 16, threads);
    share(&w, search, count * w.chunks, threads);
    w.shares = (x->vectors + FEW - 1) / FEW;
    share(&w, finish_x, count * w.shares, threads);
    w.shares = (most + FEW - 1) / FEW;
    share(&w, finish_y, count * w.shares, threads);
}
