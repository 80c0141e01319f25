// y[r] = sum of x[r, :], in double; and one that scribbles over its input.
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

static ffi::Error RowSum(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  auto dims = x.dimensions();
  if (dims.size() != 2) return ffi::Error::InvalidArgument("x must be [rows, width]");
  for (int64_t r = 0; r < dims[0]; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < dims[1]; ++i) sum += x.typed_data()[r * dims[1] + i];
    y->typed_data()[r] = static_cast<float>(sum);
  }
  return ffi::Error::Success();
}

static ffi::Error Scribble(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  ffi::Error error = RowSum(x, y);
  if (x.element_count() > 0) x.typed_data()[0] = 17.0f;
  return error;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    row_sum, RowSum,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    scribble, Scribble,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
