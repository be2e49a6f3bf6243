// Runs an artifact of the TVM backend from C++: fills the inputs with ones, prints the shape and sum of
// every output. With --files DIR inputs are read from DIR/NAME and outputs are written there, as they lie in
// memory. It needs the headers and library of apache-tvm-ffi, and libtvm_runtime.so.
//
//   FFI=$(python -m tvm_ffi.config --libdir)
//   TVM=$(dirname $(dirname $FFI))/tvm/lib
//   g++ -O2 examples/tvm_run.cc $(python -m tvm_ffi.config --cxxflags) -L$FFI -L$TVM \
//       -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi -Wl,-rpath,$FFI:$TVM -o tvm_run
//   ./tvm_run out/tvm_minilm/compiled batch=1 sequence=16
//
// For ARM it is compiled with aarch64-linux-gnu-g++, and FFI and TVM are those of the aarch64 wheels:
//
//   pip download --platform manylinux_2_28_aarch64 --only-binary=:all: --no-deps apache-tvm apache-tvm-ffi
//
// What could make the library trap is checked before it is loaded: format, architecture, CPU features, and
// that params.bin is whole. Exit code 2: the artifact or the sizes cannot be used, and why.
#ifndef __aarch64__
#include <cpuid.h>
#endif
#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

// Memory of our own for inputs.
struct Owned {
  void AllocData(DLTensor* t) {
    size_t bytes = t->dtype.bits / 8;
    for (int i = 0; i < t->ndim; ++i) bytes *= t->shape[i];
    t->data = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
  }
  void FreeData(DLTensor* t) { std::free(t->data); }
};

// Memory of a mapped file, which outlives every tensor.
struct Mapped {
  char* start;
  void AllocData(DLTensor* t) { t->data = start; }
  void FreeData(DLTensor*) {}
};

static DLDataType type_of(const std::string& name) {
  static const std::map<std::string, DLDataType> types = {
      {"float32", {kDLFloat, 32, 1}}, {"float64", {kDLFloat, 64, 1}}, {"float16", {kDLFloat, 16, 1}},
      {"int64", {kDLInt, 64, 1}},     {"int32", {kDLInt, 32, 1}},     {"int16", {kDLInt, 16, 1}},
      {"int8", {kDLInt, 8, 1}},       {"uint8", {kDLUInt, 8, 1}},     {"uint16", {kDLUInt, 16, 1}},
      {"uint32", {kDLUInt, 32, 1}},   {"uint64", {kDLUInt, 64, 1}},   {"bool", {kDLBool, 8, 1}}};
  return types.at(name);
}

static std::string text(const json::Object& record, const char* key) {
  return std::string(record[ffi::String(key)].cast<ffi::String>());
}

static size_t bytes_of(const ffi::Tensor& tensor) {
  return tensor.numel() * ((tensor.dtype().bits + 7) / 8);
}

// Ones, or what the file of that name in `files` has.
static ffi::Tensor input(const json::Object& record, const std::map<std::string, int64_t>& sizes,
                         const std::string& files) {
  std::vector<int64_t> shape;
  for (const ffi::Any& dim : record[ffi::String("shape")].cast<json::Array>()) {
    if (auto fixed = dim.as<int64_t>()) {
      shape.push_back(*fixed);
    } else {
      std::string name(dim.cast<ffi::String>());
      if (!sizes.count(name)) throw std::runtime_error("give a size: " + name + "=...");
      shape.push_back(sizes.at(name));
    }
  }
  std::string type = text(record, "stored");
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Owned(), ffi::Shape(shape.begin(), shape.end()),
                                                type_of(type), DLDevice{kDLCPU, 0});
  if (!files.empty()) {
    std::string path = files + "/" + text(record, "name");
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    size_t bytes = bytes_of(tensor);
    if (!file || size_t(file.tellg()) != bytes)
      throw std::runtime_error(path + " must have " + std::to_string(bytes) + " bytes");
    file.seekg(0).read(static_cast<char*>(tensor.data_ptr()), bytes);
    return tensor;
  }
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    if (type == "float32") static_cast<float*>(tensor.data_ptr())[i] = 1;
    else if (type == "int64") static_cast<int64_t*>(tensor.data_ptr())[i] = 1;
    else throw std::runtime_error("this example fills float32 and int64, not " + type);
  }
  return tensor;
}

// What this CPU can do, in the words of Linux. In an emulator /proc speaks of the machine around it, and
// CPUID of the CPU itself.
static std::set<std::string> cpu_features() {
#ifdef __aarch64__
  static const struct { unsigned long entry; int bit; const char* name; } known[] = {
      {AT_HWCAP, 0, "fp"},        {AT_HWCAP, 1, "asimd"},     {AT_HWCAP, 9, "fphp"},
      {AT_HWCAP, 10, "asimdhp"},  {AT_HWCAP, 12, "asimdrdm"}, {AT_HWCAP, 14, "fcma"},
      {AT_HWCAP, 20, "asimddp"},  {AT_HWCAP, 23, "asimdfhm"}, {AT_HWCAP2, 13, "i8mm"}};
  std::set<std::string> have;
  for (const auto& feature : known)
    if (getauxval(feature.entry) >> feature.bit & 1) have.insert(feature.name);
  return have;
#else
  static const struct { unsigned leaf; int reg, bit; const char* name; } known[] = {
      {1, 2, 12, "fma"},       {1, 2, 22, "movbe"},     {1, 2, 28, "avx"},       {1, 2, 29, "f16c"},
      {7, 1, 3, "bmi1"},       {7, 1, 5, "avx2"},       {7, 1, 8, "bmi2"},       {7, 1, 16, "avx512f"},
      {7, 1, 17, "avx512dq"},  {7, 1, 28, "avx512cd"},  {7, 1, 30, "avx512bw"},  {7, 1, 31, "avx512vl"},
      {7, 2, 11, "avx512_vnni"}, {0x80000001, 2, 5, "abm"}};
  std::set<std::string> have;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; have.empty() && std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    have = {std::istream_iterator<std::string>(words), {}};
  }
  for (const auto& feature : known) {
    unsigned reg[4] = {};
    __get_cpuid_count(feature.leaf, 0, &reg[0], &reg[1], &reg[2], &reg[3]);
    if (!(reg[feature.reg] >> feature.bit & 1)) have.erase(feature.name);
  }
  return have;
#endif
}

static void check(const json::Object& meta, int64_t bytes) {
  if (meta[ffi::String("format")].cast<int64_t>() != 5)
    throw std::runtime_error("the artifact has another format than this program reads");
  if (meta.count(ffi::String("archs")))
    throw std::runtime_error("the artifact is for a GPU, and this program has tensors of the CPU");
  struct utsname system;
  uname(&system);
  if (text(meta, "architecture") != system.machine)
    throw std::runtime_error("the artifact is for " + text(meta, "architecture"));
  std::set<std::string> have = cpu_features();
  std::string missing;
  for (const ffi::Any& feature : meta[ffi::String("cpu_features")].cast<json::Array>())
    if (std::string name(feature.cast<ffi::String>()); !have.count(name)) missing += " " + name;
  if (!missing.empty()) throw std::runtime_error("this CPU lacks" + missing);
  if (bytes != meta[ffi::String("parameter_bytes")].cast<int64_t>())
    throw std::runtime_error("params.bin is cut off, or not the artifact's");
}

static void check_sizes(const json::Object& meta, const std::map<std::string, int64_t>& sizes) {
  json::Object dims = meta[ffi::String("dims")].cast<json::Object>();
  for (const auto& [name, size] : sizes) {
    if (!dims.count(ffi::String(name))) throw std::runtime_error("there is no dim " + name);
    if (size < 1) throw std::runtime_error(name + " must be at least 1");
  }
}

static int run(int count, char** words) {
  std::string folder = words[1], files;
  std::map<std::string, int64_t> sizes;
  for (int i = 2; i < count; ++i) {
    std::string word = words[i];
    if (word == "--files" && i + 1 < count) {
      files = words[++i];
      continue;
    }
    size_t at = word.find('=');
    if (at == std::string::npos) return std::fprintf(stderr, "not dim=size: %s\n", words[i]), 2;
    const char* number = words[i] + at + 1;
    char* end;
    sizes[word.substr(0, at)] = std::strtoll(number, &end, 10);
    if (end == number || *end) return std::fprintf(stderr, "no size: %s\n", words[i]), 2;
  }
  std::stringstream read;
  std::ifstream description(folder + "/meta.json");
  if (!description) throw std::runtime_error(folder + " is no artifact: it has no meta.json");
  read << description.rdbuf();
  json::Object meta = json::Parse(ffi::String(read.str())).cast<json::Object>();

  int file = open((folder + "/params.bin").c_str(), O_RDONLY);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0)
    throw std::runtime_error(folder + " is no artifact: it has no params.bin");
  check(meta, status.st_size);
  check_sizes(meta, sizes);

  std::vector<ffi::Any> arguments;
  for (const ffi::Any& record : meta[ffi::String("inputs")].cast<json::Array>())
    arguments.push_back(input(record.cast<json::Object>(), sizes, files));

  char* data = nullptr;
  if (status.st_size) {
    data = static_cast<char*>(mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0));
    madvise(data, status.st_size, MADV_HUGEPAGE);  // a hint: weights are read faster so
  }
  for (const ffi::Any& item : meta[ffi::String("parameters")].cast<json::Array>()) {
    json::Object record = item.cast<json::Object>();
    std::vector<int64_t> shape;
    for (const ffi::Any& dim : record[ffi::String("shape")].cast<json::Array>())
      shape.push_back(dim.cast<int64_t>());
    Mapped place{data + record[ffi::String("offset")].cast<int64_t>()};
    arguments.push_back(ffi::Tensor::FromNDAlloc(place, ffi::Shape(shape.begin(), shape.end()),
                                                 type_of(text(record, "dtype")),
                                                 DLDevice{kDLCPU, 0}));
  }

  ffi::Module library = ffi::Module::LoadFromFile(folder + "/model.so");
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  machine->GetFunction("vm_initialization").value()(int(kDLCPU), 0, 2);
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  machine->GetFunction("main").value().CallPacked(views.data(), views.size(), &result);

  auto outputs = result.cast<ffi::Array<ffi::Tensor>>();
  auto records = meta[ffi::String("outputs")].cast<json::Array>();
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::string name = text(records[i].cast<json::Object>(), "name");
    if (!files.empty()) {
      std::ofstream file(files + "/" + name, std::ios::binary);
      file.write(static_cast<const char*>(outputs[i].data_ptr()), bytes_of(outputs[i]));
      if (!file.flush()) throw std::runtime_error("cannot write " + files + "/" + name);
    }
    std::printf("%s [", name.c_str());
    for (int axis = 0; axis < outputs[i].ndim(); ++axis)
      std::printf("%s%ld", axis ? "," : "", long(outputs[i].size(axis)));
    double sum = 0;
    if (text(records[i].cast<json::Object>(), "stored") == "float32")
      for (int64_t j = 0; j < outputs[i].numel(); ++j)
        sum += static_cast<const float*>(outputs[i].data_ptr())[j];
    std::printf("] %.6f\n", sum);
  }
  return 0;
}

int main(int count, char** words) {
  if (count < 2) {
    std::fprintf(stderr, "usage: %s FOLDER [--files DIR] [dim=size ...]\n", words[0]);
    return 2;
  }
  try {
    return run(count, words);
  } catch (const std::exception& error) {  // TVM's errors are among them: it checks every shape again
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
