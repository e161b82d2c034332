/* The library that native.py compiles: partners.c and a check of what the compiler made of it. */

#include "partners.c"

/* 0 if the compiled search finds in made-up matrices what a plain loop finds. Run once after compiling, in a process of its
   own: what a compiler got wrong may end it. */
int hf_layerprobe_check(void) {
    enum { M = 270, P = 530, N = 300 };
    static float x[M * N], y[P * N], scale_x[M], scale_y[P], best_x[M], best_y[P], true_x[M], true_y[P], scratch[ROWS * COLUMNS];
    static uint16_t packed_x[288 * 320], packed_y[544 * 320], left[288 * 320];
    static uint32_t value_x[M], value_y[2 * 544];
    static int32_t place_x[M], place_y[2 * 544];
    uint32_t state = 1;
    double lost = 0;
    if (hf_layerprobe_start()) return 1;
    for (int i = 0; i < M * N; i++) x[i] = (int32_t)(state = state * 1664525 + 1013904223) * 0x1p-31f;
    for (int i = 0; i < P * N; i++) y[i] = (int32_t)(state = state * 1664525 + 1013904223) * 0x1p-31f;
    for (int rows = 0; rows < 2; rows++) { /* vectors that are columns, then rows, of the matrices in memory */
        Matrix a = {x, rows ? N : 1, rows ? 1 : M, FLOAT32, M, N, scale_x, packed_x};
        Matrix b = {y, rows ? N : 1, rows ? 1 : P, FLOAT32, P, N, scale_y, packed_y};
        Pair pair = {&b, best_x, best_y, value_x, value_y, place_x, place_y};
        const Matrix *both[] = {&a, &b};
        for (int side = 0; side < 2; side++) {
            for (int v = 0; v < both[side]->vectors; v++) {
                const float *at = (const float *)both[side]->values + v * both[side]->step;
                double squares = 0;
                for (int k = 0; k < N; k++) squares += (double)at[k * both[side]->stride] * at[k * both[side]->stride];
                ((float *)both[side]->scale)[v] = 1 / __builtin_sqrt(squares);
            }
            hf_layerprobe_pack(both[side], 2);
        }
        hf_layerprobe_match(&a, &pair, 1, left, scratch, 1);
        memset(true_x, 0, sizeof true_x);
        memset(true_y, 0, sizeof true_y);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < P; j++) {
                float sum = 0;
                for (int k = 0; k < N; k++) sum += x[i * a.step + k * a.stride] * y[j * b.step + k * b.stride];
                sum = __builtin_fabsf(sum * scale_x[i] * scale_y[j]);
                if (sum > true_x[i]) true_x[i] = sum;
                if (sum > true_y[j]) true_y[j] = sum;
            }
        for (int i = 0; i < M; i++) lost += __builtin_fabsf(true_x[i] - best_x[i]);
        for (int j = 0; j < P; j++) lost += __builtin_fabsf(true_y[j] - best_y[j]);
    }
    return !(lost / (2 * (M + P)) < 1e-5);
}
