/* The arithmetic of averaging and nothing else: what is left is the speed of memory.

   Pairs of arrays are cut into blocks, which the caller and its helpers take from one counter, so
   that many small tensors cost what one large one does. Nobody waits for a helper that has not
   begun: on a busy machine the caller does the work alone. (OpenMP's barrier would wait.) */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 1 << 16, LERP_FLOAT32 = 0, LERP_BFLOAT16 = 1, SWAP_FLOAT32 = 2 };

static struct {
    int operation;
    float mix;
    float **averages;
    void **weights;
    const long *starts; /* where each tensor begins among all elements; then the total */
    long count, blocks;
} job;

static atomic_long next_block, blocks_done;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;
static long jobs_given;
static int helpers;

/* average += mix * (weight - average): reads both, writes one; 12 bytes an element. */
static void lerp_float32(float *restrict average, const float *restrict weight, long n, float mix)
{
    for (long i = 0; i < n; i++) average[i] += mix * (weight[i] - average[i]);
}

/* The same with bfloat16 weights, the upper halves of float32: 10 bytes an element. */
static void lerp_bfloat16(float *restrict average, const uint16_t *restrict weight, long n, float mix)
{
    for (long i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)weight[i] << 16;
        float wide;
        memcpy(&wide, &bits, sizeof wide);
        average[i] += mix * (wide - average[i]);
    }
}

/* Both change places: reads two, writes two; 16 bytes an element. */
static void swap_float32(float *restrict average, float *restrict weight, long n)
{
    for (long i = 0; i < n; i++) {
        float held = average[i];
        average[i] = weight[i];
        weight[i] = held;
    }
}

static void do_block(long block)
{
    long first = block * BLOCK, end = first + BLOCK, total = job.starts[job.count];
    if (end > total) end = total;
    long low = 0, high = job.count; /* the block begins in tensor low, and before tensor high */
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (job.starts[middle] <= first) low = middle;
        else high = middle;
    }
    for (long tensor = low; first < end; tensor++) {
        long begin = first - job.starts[tensor];
        long stop = job.starts[tensor + 1] < end ? job.starts[tensor + 1] : end;
        float *average = job.averages[tensor] + begin;
        if (job.operation == LERP_FLOAT32)
            lerp_float32(average, (float *)job.weights[tensor] + begin, stop - first, job.mix);
        else if (job.operation == LERP_BFLOAT16)
            lerp_bfloat16(average, (uint16_t *)job.weights[tensor] + begin, stop - first, job.mix);
        else
            swap_float32(average, (float *)job.weights[tensor] + begin, stop - first);
        first = stop;
    }
}

static void do_blocks(void)
{
    long block;
    while ((block = atomic_fetch_add(&next_block, 1)) < job.blocks) {
        do_block(block);
        atomic_fetch_add(&blocks_done, 1);
    }
}

static void *help(void *unused)
{
    long seen = 0;
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (seen == jobs_given) pthread_cond_wait(&work, &lock);
        seen = jobs_given;
        pthread_mutex_unlock(&lock);
        do_blocks();
    }
    return NULL;
}

/* Does the operation on all pairs, with `threads` threads, the caller's among them. One caller at a
   time. Returns how many threads there are, which is fewer if the system gave no more. */
int run(int operation, float **averages, void **weights, const long *starts, long count, float mix,
        int threads)
{
    pthread_t thread;
    while (helpers < threads - 1 && pthread_create(&thread, NULL, help, NULL) == 0) {
        pthread_detach(thread);
        helpers++;
    }
    /* A helper that comes late from the last job must find nothing while this one is written. */
    atomic_store(&next_block, (long)1 << 40);
    job.operation = operation;
    job.mix = mix;
    job.averages = averages;
    job.weights = weights;
    job.starts = starts;
    job.count = count;
    job.blocks = (starts[count] + BLOCK - 1) / BLOCK;
    atomic_store(&blocks_done, 0);
    atomic_store(&next_block, 0);
    pthread_mutex_lock(&lock);
    jobs_given++;
    pthread_cond_broadcast(&work);
    pthread_mutex_unlock(&lock);
    do_blocks();
    while (atomic_load(&blocks_done) < job.blocks) sched_yield();
    return helpers + 1;
}
