// x̂ = αx + (1−α)x̃ on a CPU: one read of real and fake, one write.

#include "samples.h"

namespace wgan_fast {
namespace {

// Samples shorter than this are mixed several at a time, with α spread over their elements.
constexpr int64_t kShortSample = 64;

// From the nearer end, as torch.lerp: both ends come out bit for bit.
template <typename C>
inline __attribute__((always_inline)) C mix(C real, C fake, C alpha) {
  const C difference = real - fake;
  return alpha < C(0.5) ? fake + alpha * difference : real - (1 - alpha) * difference;
}

// The output may be one of the inputs, element for element, which ivdep allows and __restrict__ would not.
template <typename C>
inline __attribute__((always_inline)) void mix_sample(const C* real, const C* fake, C* out, int64_t count,
                                                      C alpha) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = mix(real[i], fake[i], alpha);
}
template <typename C>
inline __attribute__((always_inline)) void mix_elements(const C* real, const C* fake, C* out, int64_t count,
                                                        const C* alpha) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = mix(real[i], fake[i], alpha[i]);
}

#define WGAN_FAST_MIX(C)                                                                               \
  WGAN_FAST_CPU_CLONES void run_sample(const C* real, const C* fake, C* out, int64_t count, C alpha) { \
    mix_sample(real, fake, out, count, alpha);                                                         \
  }                                                                                                    \
  WGAN_FAST_CPU_CLONES void run_elements(const C* real, const C* fake, C* out, int64_t count,          \
                                         const C* alpha) {                                             \
    mix_elements(real, fake, out, count, alpha);                                                       \
  }

WGAN_FAST_MIX(float)
WGAN_FAST_MIX(double)

#undef WGAN_FAST_MIX

template <typename C>
void interpolate_as(const Tensor& out, const Tensor& real, const Tensor& fake, const Tensor& alpha) {
  const int64_t size = real.numel(), samples = real.sizes()[0], features = size / samples;
  const int64_t group = features * (samples / alpha.numel());  // elements that share one α
  const Source<C> reals(real), fakes(fake);
  const Target<C> target(out);
  const auto* const alphas = static_cast<const C*>(alpha.const_data_ptr());
  const bool direct = reals.direct() && fakes.direct() && target.direct();

  parallel_grains(size, kGrainSize, [&](int64_t begin, int64_t end) {
    C real_buffer[kBufferSize], fake_buffer[kBufferSize], out_buffer[kBufferSize], alpha_buffer[kBufferSize];
    for (int64_t at = begin; at < end;) {
      const int64_t first = at / group;
      int64_t count;
      if (group < kShortSample) {
        count = std::min(end - at, kBufferSize);
        for (int64_t i = 0, g = first, left = (first + 1) * group - at; i < count; ++g, left = group)
          for (const int64_t stop = std::min(i + left, count); i < stop; ++i) alpha_buffer[i] = alphas[g];
      } else {
        count = std::min(end, (first + 1) * group) - at;
        if (!direct) count = std::min(count, kBufferSize);
      }
      const C* const x = reals.read(at, count, real_buffer);
      const C* const y = fakes.read(at, count, fake_buffer);
      C* const place = target.place(at, out_buffer);
      if (group < kShortSample)
        run_elements(x, y, place, count, alpha_buffer);
      else
        run_sample(x, y, place, count, alphas[first]);
      target.flush(at, count, place);
      at += count;
    }
  });
}

// Whether writing one tensor may change the other, other than element for element.
bool clash(const Tensor& out, const Tensor& in) {
  const auto* const a = static_cast<const char*>(out.const_data_ptr());
  const auto* const b = static_cast<const char*>(in.const_data_ptr());
  if (a == b && out.scalar_type() == in.scalar_type() && out.numel() == in.numel()) return false;
  return a < b + in.numel() * element_size(in.scalar_type()) &&
         b < a + out.numel() * element_size(out.scalar_type());
}

// A batch as it is, or a copy, with dense samples in the layout of `like`.
Tensor arranged(const Tensor& batch, const Tensor& like) {
  if (has_dense_samples(batch) && same_layout(batch, like)) return batch;
  Tensor copy = empty_samples(like, batch.sizes()[0], batch.scalar_type());
  return torch::stable::copy_(copy, batch);
}

// Checks the inputs and copies those that cannot be read where they lie.
void prepare(Tensor& real, Tensor& fake, Tensor& alpha) {
  for (const auto* tensor : {&real, &fake, &alpha})
    STD_TORCH_CHECK(tensor->dim() > 0 && tensor->numel() > 0, "expected batches that are not empty");
  STD_TORCH_CHECK(real.sizes().equals(fake.sizes()), "expected real and fake of one shape");
  STD_TORCH_CHECK(real.sizes()[0] % alpha.numel() == 0, "expected one alpha per group of samples");
  STD_TORCH_CHECK(alpha.scalar_type() == ScalarType::Double || alpha.scalar_type() == ScalarType::Float,
                  "expected alpha in float32 or float64");
  if (!has_dense_samples(real)) real = torch::stable::contiguous(real);
  fake = arranged(fake, real);
  if (!alpha.is_contiguous()) alpha = torch::stable::contiguous(alpha);
}

void write(const Tensor& out, const Tensor& real, const Tensor& fake, const Tensor& alpha) {
  if (alpha.scalar_type() == ScalarType::Double)
    interpolate_as<double>(out, real, fake, alpha);
  else
    interpolate_as<float>(out, real, fake, alpha);
}

void interpolate_into(Tensor out, Tensor real, Tensor fake, Tensor alpha) {
  const NoGradGuard no_grad;
  prepare(real, fake, alpha);
  STD_TORCH_CHECK(out.sizes().equals(real.sizes()), "expected room for the interpolates");
  const bool aside = !has_dense_samples(out) || !same_layout(out, real) || clash(out, real) ||
                     clash(out, fake) || clash(out, alpha);
  const Tensor target = aside ? empty_samples(real, out.sizes()[0], out.scalar_type()) : out;
  write(target, real, fake, alpha);
  if (aside)
    torch::stable::copy_(out, target);
  else
    bump_version(out);
}

Tensor interpolate(Tensor real, Tensor fake, Tensor alpha) {
  const NoGradGuard no_grad;
  prepare(real, fake, alpha);
  const Tensor out = empty_samples(real, real.sizes()[0], fake.scalar_type());
  write(out, real, fake, alpha);
  return out;
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CPU, m) {
  m.impl("interpolate_into", TORCH_BOX(&wgan_fast::interpolate_into));
  m.impl("interpolate", TORCH_BOX(&wgan_fast::interpolate));
}
