// Memory read bandwidth: THREADS threads, each reading its own GiB as STREAMS streams, with huge pages or not.
// The best of four passes is printed in GB/s. Reading streams that lie far apart lets the hardware prefetch
// more at once; which number is best differs from machine to machine, so the caller tries several.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef long long lanes __attribute__((vector_size(64), aligned(64)));

enum { MAX_STREAMS = 8, REPEATS = 4, PASSES = 5 };
static const size_t BYTES = 1ul << 30;
static int streams;
static pthread_barrier_t gate;

typedef struct {
    char* data;
    volatile long long sum; // keeps the compiler from dropping the loads
} Reader;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void* read_all(void* argument) {
    Reader* reader = argument;
    lanes sums[MAX_STREAMS] = {0};
    size_t length = BYTES / streams;
    pthread_barrier_wait(&gate);
    for (int pass = 0; pass < PASSES; pass++)
        for (size_t i = 0; i < length; i += 128)
            for (int s = 0; s < streams; s++) {
                const lanes* p = (const lanes*)(reader->data + s * length + i);
                sums[s] ^= p[0];
                sums[s] ^= p[1];
            }
    lanes sum = {0};
    for (int s = 0; s < MAX_STREAMS; s++) sum ^= sums[s];
    reader->sum = sum[0] ^ sum[7];
    pthread_barrier_wait(&gate);
    return NULL;
}

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    int threads = atoi(argv[1]), huge = atoi(argv[3]);
    streams = atoi(argv[2]);
    if (threads < 1 || streams < 1 || streams > MAX_STREAMS) return 2;
    char* data = aligned_alloc(1 << 21, BYTES * threads);
    if (!data) return 1;
    madvise(data, BYTES * threads, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    memset(data, 1, BYTES * threads);
    pthread_t ids[threads];
    Reader readers[threads];
    double best = 1e9;
    pthread_barrier_init(&gate, NULL, threads + 1);
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        for (int i = 0; i < threads; i++) {
            readers[i].data = data + BYTES * i;
            pthread_create(&ids[i], NULL, read_all, &readers[i]);
        }
        pthread_barrier_wait(&gate);
        double start = now();
        pthread_barrier_wait(&gate);
        double seconds = now() - start;
        for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
        if (seconds < best) best = seconds;
    }
    printf("%.2f\n", (double)BYTES * threads * PASSES / best / 1e9);
    return 0;
}
