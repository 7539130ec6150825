// The Python module wgan_fast._C: loading it registers the operators; what it exports is how it was built.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#ifdef USE_CUDA
#include <cuda.h>
#endif

#include <string>

#include "program.h"

namespace py = pybind11;

namespace {

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

std::string version(unsigned long long packed) {
  return std::to_string(packed >> 56) + "." + std::to_string(packed >> 48 & 0xFF);
}

py::dict build_config() {
  py::dict config;
  config["compiler"] = kCompiler;
  config["flags"] = WGAN_FAST_FLAGS;
  config["torch"] = TORCH_VERSION;
  config["products"] = wgan_fast::tiles().name;
  config["bf16_products"] = wgan_fast::tiles().multiply16 != nullptr;
  config["torch_abi"] = version(WGAN_FAST_TORCH_ABI);
#ifdef USE_CUDA
  config["cuda"] = std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
  config["cuda_architectures"] = WGAN_FAST_CUDA_ARCHITECTURES;
#else
  config["cuda"] = py::none();
  config["cuda_architectures"] = py::none();
#endif
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_config", &build_config, "How this extension was built."); }
