/* The ops on NVIDIA GPUs, for programs without Python. What each op computes stands in swag_kernels/ops.py; a struct's
 * members have the names, shapes and meaning of the op's arguments there.
 *
 * Every function checks its arguments on the host, launches on the given stream and returns without waiting. Tensors are
 * contiguous memory of the current device unless a stride says otherwise; "host" marks what is read by the CPU, and only
 * until the function returns. 16-byte alignment is demanded of float32 arenas (mean, m2, std, deviations, draws). A size may
 * be 0 unless it says otherwise; sizes are less than 2^31, an arena's less than 2^41.
 */
#ifndef SWAG_KERNELS_H
#define SWAG_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define SWAG_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum swag_status {
  SWAG_OK = 0,
  SWAG_INVALID_ARGUMENT = 1, /* nothing was launched */
  SWAG_CUDA_ERROR = 2,       /* a launch failed: the outputs are undefined */
  SWAG_OUT_OF_MEMORY = 3,    /* of the host: the outputs are undefined */
};

enum swag_dtype { SWAG_FLOAT32 = 0, SWAG_BFLOAT16 = 1, SWAG_FLOAT16 = 2 };

typedef void* swag_stream; /* a cudaStream_t */

/* A segment of the arena: one tensor, or a shard of one. Segments ascend without overlap. */
typedef struct swag_segment {
  int64_t offset; /* first element in the arena, a multiple of 1024 */
  int64_t numel;
  int64_t first; /* index of that element within the whole tensor, a multiple of 4; 0 unless sharded */
} swag_segment;

typedef struct swag_collect_args {
  const void* const* params; /* host [num_tensors] of device addresses */
  const int32_t* dtypes;     /* host [num_tensors] of swag_dtype */
  const swag_segment* layout; /* host [num_tensors] */
  int64_t num_tensors;
  int64_t size; /* N, a multiple of 1024 */
  float* mean;  /* [size] */
  float* m2;    /* [size] */
  float* deviations; /* [rank, size], or NULL if rank is 0 */
  int64_t rank;
  int64_t* count; /* scalar on the device, less than 2^31; increased by one */
} swag_collect_args;

typedef struct swag_draw_args {
  const float* mean;       /* [size] */
  const float* std;        /* [size] */
  const float* deviations; /* [rank, size], or NULL if rank is 0 */
  int64_t rank;
  int64_t size;
  const swag_segment* layout; /* host [num_tensors] */
  int64_t num_tensors;
  void* out; /* [num_samples, size]; elements of no segment become 0 */
  int32_t dtype;
  int64_t num_samples;
  uint64_t seed;
  int64_t first_sample; /* first_sample + num_samples <= 2^32 */
  float diag_scale;
  float low_rank_scale;
  int32_t antithetic; /* 0 or 1 */
} swag_draw_args;

/* Strides count elements from one sample to the next and are 0 where all samples share one. */
typedef struct swag_sampled_lora_args {
  const void* x;    /* [samples, rows, in] */
  const void* A;    /* [samples, rank, in] */
  const void* B;    /* [samples, out, rank] */
  const void* base; /* [samples, rows, out] */
  void* y;          /* [samples, rows, out], without gaps; base itself if that has none, or memory of its own */
  int64_t samples, rows, in, out; /* in at least 1, in and out at most 2^30 */
  int64_t rank; /* 1 to 64 */
  int64_t stride_x, stride_A, stride_B, stride_base;
  float scaling;
  int32_t dtype;      /* of x, A and B */
  int32_t base_dtype; /* of base and y */
} swag_sampled_lora_args;

typedef struct swag_bayes_average_args {
  const void* logits; /* [samples, batch, classes] */
  int32_t dtype;
  int64_t samples, batch, classes;
  float* log_sum; /* [batch, classes] */
  float* m2;      /* [batch, classes] */
  float* votes;   /* [batch, classes] */
  float* entropy; /* [batch] */
  int64_t* count; /* scalar on the device, less than 2^31; increased by samples */
  int32_t group;  /* 1, or 2 for antithetic pairs */
  void* workspace; /* swag_bayes_average_workspace() bytes, aligned to 16; may be NULL if that is 0 */
} swag_bayes_average_args;

SWAG_API int swag_collect(const swag_collect_args* args, swag_stream stream);
SWAG_API int swag_draw(const swag_draw_args* args, swag_stream stream);
SWAG_API int swag_sampled_lora(const swag_sampled_lora_args* args, swag_stream stream);
SWAG_API int swag_bayes_average(const swag_bayes_average_args* args, swag_stream stream);

/* Bytes that swag_bayes_average needs for these sizes, 0 if they are invalid; the pointers are not looked at. */
SWAG_API size_t swag_bayes_average_workspace(const swag_bayes_average_args* args);

/* What the calling thread's last failed function found wrong; empty if none failed. Valid until its next call. */
SWAG_API const char* swag_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
