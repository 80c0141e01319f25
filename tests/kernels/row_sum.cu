// y[r] = sum of x[r, :]: one block of 128 threads a row.
#include <cuda_runtime.h>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

__global__ void SumRow(const float* x, float* y, int64_t width) {
  __shared__ float sums[128];
  float sum = 0;
  for (int64_t i = threadIdx.x; i < width; i += 128) sum += x[blockIdx.x * width + i];
  sums[threadIdx.x] = sum;
  for (int half = 64; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) y[blockIdx.x] = sums[0];
}

static ffi::Error RowSum(cudaStream_t stream, ffi::Buffer<ffi::F32> x,
                         ffi::ResultBuffer<ffi::F32> y) {
  auto dims = x.dimensions();
  if (dims.size() != 2) return ffi::Error::InvalidArgument("x must be [rows, width]");
  if (dims[0] > 0) SumRow<<<dims[0], 128, 0, stream>>>(x.typed_data(), y->typed_data(), dims[1]);
  if (cudaGetLastError() != cudaSuccess) return ffi::Error::Internal("the launch failed");
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    row_sum, RowSum,
    ffi::Ffi::Bind()
        .Ctx<ffi::PlatformStream<cudaStream_t>>()
        .Arg<ffi::Buffer<ffi::F32>>()
        .Ret<ffi::Buffer<ffi::F32>>());
