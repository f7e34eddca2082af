// Two CUDA devices in host memory, for a torch that was built without CUDA.
//
// What torch has for CUDA in a CPU build is everything but the device: the dispatch key, autograd, autocast, and the
// places where a backend registers itself. This file fills those places. The memory of a device is host memory that is
// counted; an operator is the CPU's operator, run after the question that a GPU would ask, whether all tensors are on
// one device; streams are names in whose order nothing changes.
//
// The library must be loaded before torch is imported, since torch looks for its CUDA hooks once, while it is imported.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex DEVICES = 2;
constexpr int64_t TOTAL_MEMORY = int64_t{8} << 30; // bytes, on each device

// ---- the current device -------------------------------------------------------------------------------------------

thread_local c10::DeviceIndex current_device = 0;

c10::DeviceIndex exchange_device(c10::DeviceIndex index) {
  TORCH_CHECK(index < DEVICES, "CUDA error: invalid device ordinal");
  auto before = current_device;
  if (index >= 0) { // torch says -1 for "leave it"
    current_device = index;
  }
  return before;
}

// `cuda` without an index is the current device.
c10::Device with_index(std::optional<c10::Device> device) {
  if (!device || device->index() < 0) {
    return {CUDA, current_device};
  }
  TORCH_CHECK(device->index() < DEVICES, "CUDA error: invalid device ordinal");
  return *device;
}

// ---- memory -------------------------------------------------------------------------------------------------------

void* aligned_host_memory(size_t bytes) {
  void* memory = nullptr;
  TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "the host has no ", bytes, " bytes left");
  return memory;
}

// The memory of all devices. It caches nothing, so that what is allocated is exactly what is alive.
class DeviceMemory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    return allocate_on(current_device, bytes);
  }

  c10::DataPtr allocate_on(c10::DeviceIndex index, size_t bytes) {
    if (bytes == 0) {
      return {nullptr, nullptr, &release, {CUDA, index}};
    }
    const size_t size = (bytes + 511) / 512 * 512; // as CUDA's allocator counts
    std::lock_guard<std::mutex> lock(mutex_);
    refuse_above_the_limit(index, size);
    void* memory = aligned_host_memory(size);
    std::memset(memory, 0xFF, size); // NaN in every floating type: nothing may rely on fresh memory
    blocks_[memory] = {size, index};
    stats_[index].allocation[ALL].increase(1);
    stats_[index].allocated_bytes[ALL].increase(size);
    stats_[index].reserved_bytes[ALL].increase(size);
    return {memory, memory, &release, {CUDA, index}};
  }

  void set_limit(c10::DeviceIndex index, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limits_[index] = bytes;
  }

  int64_t limit(c10::DeviceIndex index) {
    std::lock_guard<std::mutex> lock(mutex_);
    return limits_[index];
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }

  bool initialized() override {
    return true;
  }

  void emptyCache(c10::MempoolId_t) override {}

  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_[index];
  }

  void resetAccumulatedStats(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_[index].allocation[ALL].reset_accumulated();
    stats_[index].allocated_bytes[ALL].reset_accumulated();
    stats_[index].reserved_bytes[ALL].reset_accumulated();
  }

  void resetPeakStats(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_[index].allocation[ALL].reset_peak();
    stats_[index].allocated_bytes[ALL].reset_peak();
    stats_[index].reserved_bytes[ALL].reset_peak();
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return {TOTAL_MEMORY - stats_[index].allocated_bytes[ALL].current, TOTAL_MEMORY};
  }

 private:
  static constexpr auto ALL = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);

  struct Block {
    size_t size;
    c10::DeviceIndex index;
  };

  void refuse_above_the_limit(c10::DeviceIndex index, size_t size) {
    const auto used = stats_[index].allocated_bytes[ALL].current;
    if (used + static_cast<int64_t>(size) > limits_[index]) {
      stats_[index].num_ooms++;
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size, " bytes. GPU ", int{index},
          " (simulated) may use ", limits_[index], " bytes, of which ", used, " are in use.");
    }
  }

  static void release(void* memory);

  std::mutex mutex_;
  std::unordered_map<void*, Block> blocks_;
  c10::CachingDeviceAllocator::DeviceStats stats_[DEVICES];
  int64_t limits_[DEVICES] = {TOTAL_MEMORY, TOTAL_MEMORY};
};

// Never destroyed: Python may still hold tensors when the process ends.
DeviceMemory& device_memory() {
  static auto* memory = new DeviceMemory();
  return *memory;
}

void DeviceMemory::release(void* memory) {
  if (memory == nullptr) {
    return;
  }
  auto& self = device_memory();
  std::lock_guard<std::mutex> lock(self.mutex_);
  const auto block = self.blocks_.extract(memory).mapped();
  self.stats_[block.index].allocation[ALL].decrease(1);
  self.stats_[block.index].allocated_bytes[ALL].decrease(block.size);
  self.stats_[block.index].reserved_bytes[ALL].decrease(block.size);
  std::free(memory);
}

REGISTER_ALLOCATOR(CUDA, &device_memory());

// Host memory that `is_pinned()` recognises.
class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &release, c10::kCPU};
    }
    void* memory = aligned_host_memory(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_[static_cast<char*>(memory)] = bytes;
    return {memory, memory, &release, c10::kCPU};
  }

  bool holds(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto* wanted = static_cast<char*>(const_cast<void*>(address));
    auto next = blocks_.upper_bound(wanted);
    return next != blocks_.begin() && wanted < std::prev(next)->first + std::prev(next)->second;
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }

 private:
  static void release(void* memory);

  std::mutex mutex_;
  std::map<char*, size_t> blocks_; // size by first address
};

PinnedMemory& pinned_memory() {
  static auto* memory = new PinnedMemory();
  return *memory;
}

void PinnedMemory::release(void* memory) {
  auto& self = pinned_memory();
  std::lock_guard<std::mutex> lock(self.mutex_);
  self.blocks_.erase(static_cast<char*>(memory));
  std::free(memory);
}

// ---- counters -----------------------------------------------------------------------------------------------------

struct Counters {
  std::atomic<int64_t> operations{0};
  std::atomic<int64_t> copies_to_device{0}, bytes_to_device{0};
  std::atomic<int64_t> copies_to_host{0}, bytes_to_host{0};
  std::atomic<int64_t> copies_between_devices{0}, bytes_between_devices{0};
  std::atomic<int64_t> numbers_read{0}; // .item() and its like, where a GPU waits
} counters;

// Inside an operator the values travel to the CPU and back: the simulation's business, which is not counted.
thread_local int operators_deep = 0;

struct InsideOperator {
  InsideOperator() {
    operators_deep++;
  }
  ~InsideOperator() {
    operators_deep--;
  }
};

void count_copy(const at::Tensor& target, const at::Tensor& source) {
  if (operators_deep > 0 || target.device() == source.device()) {
    return;
  }
  const auto bytes = static_cast<int64_t>(source.nbytes());
  if (source.is_cpu()) {
    counters.copies_to_device++;
    counters.bytes_to_device += bytes;
  } else if (target.is_cpu()) {
    counters.copies_to_host++;
    counters.bytes_to_host += bytes;
  } else {
    counters.copies_between_devices++;
    counters.bytes_between_devices += bytes;
  }
}

// ---- streams and events -------------------------------------------------------------------------------------------

thread_local c10::StreamId current_streams[DEVICES] = {};
std::atomic<c10::StreamId> streams_made{0};

c10::Stream stream_of(c10::Device device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, with_index(device), id);
}

// What torch asks of a backend whenever it changes devices or streams. All work is done when it is asked for, so there
// is nothing to wait for.
struct DeviceGuardOfCuda final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = CUDA;

  c10::DeviceType type() const override {
    return CUDA;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return DEVICES;
  }
  c10::Device getDevice() const override {
    return {CUDA, current_device};
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {CUDA, exchange_device(device.index())};
  }
  void setDevice(c10::Device device) const override {
    exchange_device(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    exchange_device(device.index());
  }

  c10::Stream getStream(c10::Device device) const override {
    return stream_of(device, current_streams[with_index(device).index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_of(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return stream_of(device, ++streams_made);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream_of(device, ++streams_made);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(stream.device(), std::exchange(current_streams[stream.device_index()], stream.id()));
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void*, void*, c10::DeviceIndex) const override {
    return 0;
  }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, DeviceGuardOfCuda);

// ---- random numbers -----------------------------------------------------------------------------------------------

// A generator that says it lives on a CUDA device; its numbers are those of a CPU generator.
class CudaGenerator final : public c10::GeneratorImpl {
 public:
  CudaGenerator(c10::Device device, at::Generator numbers)
      : GeneratorImpl(device, c10::DispatchKeySet(c10::DispatchKey::CUDA)), numbers(std::move(numbers)) {}

  void set_current_seed(uint64_t seed) override {
    numbers.set_current_seed(seed);
  }
  uint64_t current_seed() const override {
    return numbers.current_seed();
  }
  uint64_t seed() override {
    return numbers.seed();
  }
  void set_offset(uint64_t offset) override {
    numbers.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return numbers.get_offset();
  }
  void set_state(const c10::TensorImpl& state) override {
    numbers.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return numbers.unsafeGetGeneratorImpl()->get_state();
  }

  at::Generator numbers;

 private:
  CudaGenerator* clone_impl() const override {
    return new CudaGenerator(device(), numbers.clone());
  }
};

// The generator with which the CPU draws for a tensor on `device`.
at::Generator numbers_of(const at::Generator& generator, c10::Device device) {
  TORCH_CHECK(
      generator.device().type() == device.type(), "Expected a '", device.type(),
      "' device type for generator but found '", generator.device().type(), "'");
  return static_cast<CudaGenerator*>(generator.unsafeGetGeneratorImpl())->numbers;
}

// ---- the rule of one device ---------------------------------------------------------------------------------------

[[noreturn]] void refuse(c10::Device one, c10::Device other, const c10::OperatorHandle& op) {
  TORCH_CHECK(
      false, "Expected all tensors to be on the same device, but found at least two devices, ", one, " and ", other,
      "! (when checking the arguments of ", op.schema().name(), ")");
}

// The devices that an operator's arguments are on: at most one, or this refuses. A 0-dim CPU tensor is a number.
class OneDevice {
 public:
  explicit OneDevice(const c10::OperatorHandle& op) : op_(op) {}

  void add(const c10::IValue& value) {
    if (value.isTensor()) {
      add(value.toTensor());
    } else if (value.isList()) {
      for (const c10::IValue& element : value.toListRef()) {
        add(element);
      }
    }
  }

  // Indices may also be on the CPU.
  void add_indices(const c10::IValue& indices) {
    for (const c10::IValue& element : indices.toListRef()) {
      if (element.isTensor() && element.toTensor().defined() && !element.toTensor().is_cpu()) {
        const auto device = element.toTensor().device();
        TORCH_CHECK(
            found && *found == device, "indices should be either on cpu or on the same device as the indexed tensor (",
            found.value_or(c10::kCPU), ")");
      }
    }
  }

  std::optional<c10::Device> found;

 private:
  void add(const at::Tensor& tensor) {
    if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) {
      return;
    }
    if (found && *found != tensor.device()) {
      refuse(*found, tensor.device(), op_);
    }
    found = tensor.device();
  }

  const c10::OperatorHandle& op_;
};

bool is_indexing(const std::string& name) {
  return name == "aten::index" || name == "aten::_unsafe_index" || name == "aten::index_put_" ||
      name == "aten::_index_put_impl_";
}

std::optional<c10::Device> device_of(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  OneDevice device(op);
  const bool indexing = is_indexing(op.schema().name());
  for (size_t i = 0; i < arguments.size(); i++) {
    if (indexing && i == 1) {
      device.add_indices(arguments[i]);
    } else {
      device.add(arguments[i]);
    }
  }
  return device.found;
}

// ---- operators ----------------------------------------------------------------------------------------------------

// Every operator without a line of its own below.
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const auto device = device_of(op, arguments);
  for (auto& value : torch::jit::last(*stack, arguments.size())) {
    if (value.isGenerator()) {
      const_cast<c10::IValue&>(value) = numbers_of(value.toGenerator(), device.value_or(c10::Device(CUDA, current_device)));
    }
  }
  counters.operations++;
  InsideOperator inside;
  c10::OptionalDeviceGuard guard(device);
  at::native::cpu_fallback(op, stack, /*error_on_views=*/false);
}

// The same values as a CPU tensor, without a copy.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) {
    return tensor;
  }
  auto storage = tensor.storage();
  auto* first = static_cast<char*>(const_cast<void*>(storage.data())) + tensor.storage_offset() * tensor.element_size();
  auto values = at::from_blob(
      first, tensor.sizes(), tensor.strides(), [storage](void*) {},
      tensor.options().device(at::kCPU).requires_grad(false));
  values._set_conj(tensor.is_conj());
  values._set_neg(tensor.is_neg());
  return values;
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(with_index(device));
  return at::detail::empty_generic(
      size, &device_memory(), c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(with_index(device));
  return at::detail::empty_strided_generic(
      size, stride, &device_memory(), c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  if (self.is_meta() || source.is_meta()) {
    return self;
  }
  count_copy(self, source);
  on_cpu(self).copy_(on_cpu(source));
  return self;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  count_copy(target, source);
  on_cpu(target).copy_(on_cpu(source));
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar read_number(const at::Tensor& tensor) {
  if (operators_deep == 0) {
    counters.numbers_read++;
  }
  return on_cpu(tensor).item();
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  auto memory = device_memory().allocate_on(storage.device().index(), bytes);
  if (bytes > 0 && storage.nbytes() > 0) {
    std::memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
  }
  auto* impl = storage.unsafeGetStorageImpl();
  impl->set_data_ptr_noswap(std::move(memory));
  impl->set_nbytes(bytes);
}

const at::Tensor& resize_(
    const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  const auto wanted = C10_AS_INTARRAYREF_SLOW(size);
  if (wanted != impl->sizes()) { // a view of the right size keeps its strides
    impl->set_sizes_contiguous(wanted);
  }
  if (format && *format != at::MemoryFormat::Preserve) {
    impl->empty_tensor_restride(*format);
  }
  const size_t bytes = (impl->numel() + impl->storage_offset()) * self.element_size();
  if (self.storage().nbytes() < bytes) { // it grows, but does not shrink, as everywhere in torch
    resize_storage(self.storage(), bytes);
  }
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_and_dtype(std::move(source), self.dtype());
  impl->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_strided(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return set_storage(
      self, std::move(source), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_empty(at::Tensor& self) {
  return set_tensor(self, at::empty({0}, self.options()));
}

void record_stream(at::Tensor&, c10::Stream) {}

// CUDA's softmax can give float32 for half precision, in one pass and under autocast always; the CPU's cannot.
template <at::Tensor (*function)(const at::Tensor&, int64_t, bool)>
at::Tensor softmax(const at::Tensor& self, int64_t dim, bool half_to_float) {
  counters.operations++;
  InsideOperator inside;
  const auto values = half_to_float ? on_cpu(self).to(at::kFloat) : on_cpu(self);
  return function(values, dim, false).to(self.device());
}

template <at::Tensor (*function)(const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType)>
at::Tensor softmax_backward(
    const at::Tensor& grad, const at::Tensor& output, int64_t dim, at::ScalarType input_dtype) {
  counters.operations++;
  InsideOperator inside;
  return function(on_cpu(grad), on_cpu(output), dim, output.scalar_type()).to(input_dtype).to(grad.device());
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", read_number);
  library.impl("resize_", resize_);
  library.impl("set_", set_empty);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", set_strided);
  library.impl("record_stream", record_stream);

  // Views share memory; the fallback would copy it.
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("alias", TORCH_FN(at::native::alias));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  library.impl("view_as_real", TORCH_FN(at::native::view_as_real));

  library.impl("_softmax", softmax<at::_softmax>);
  library.impl("_log_softmax", softmax<at::_log_softmax>);
  library.impl("_softmax_backward_data", softmax_backward<at::_softmax_backward_data>);
  library.impl("_log_softmax_backward_data", softmax_backward<at::_log_softmax_backward_data>);

  // torch's own kernel for any device looks for cuDNN's convolutions here.
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  library.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

// ---- what torch asks of CUDA itself, and what Python asks of the simulation ---------------------------------------

struct HooksOfCuda final : at::CUDAHooksInterface {
  explicit HooksOfCuda(at::CUDAHooksArgs) {}

  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }

  int getNumGPUs() const override {
    return DEVICES;
  }
  c10::DeviceIndex deviceCount() const override {
    return DEVICES;
  }
  // CUDAHooksInterface and AcceleratorHooksInterface have a name each.
  c10::DeviceIndex current_device() const override {
    return ::current_device;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return ::current_device;
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    exchange_device(index);
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return exchange_device(index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchange_device(index);
  }
  void deviceSynchronize(c10::DeviceIndex) const override {}

  at::Allocator* getCUDADeviceAllocator() const override {
    return &device_memory();
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_memory();
  }
  bool isPinnedPtr(const void* address) const override {
    return pinned_memory().holds(address);
  }

  // Without a generator the CPU's own is drawn from, so that the same seed gives the same numbers on both.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<CudaGenerator>(with_index(c10::Device(CUDA, index)), at::detail::createCPUGenerator());
  }
};

std::vector<int64_t> read_counters() {
  return {
      counters.operations,      counters.copies_to_device,       counters.bytes_to_device,       counters.copies_to_host,
      counters.bytes_to_host,   counters.copies_between_devices, counters.bytes_between_devices, counters.numbers_read,
  };
}

void set_memory_fraction(double fraction, int64_t index) {
  device_memory().set_limit(
      static_cast<c10::DeviceIndex>(index), static_cast<int64_t>(fraction * static_cast<double>(TOTAL_MEMORY)));
}

double memory_fraction(int64_t index) {
  const auto limit = device_memory().limit(static_cast<c10::DeviceIndex>(index));
  return static_cast<double>(limit) / static_cast<double>(TOTAL_MEMORY);
}

int64_t device_count() {
  return DEVICES;
}

int64_t total_memory() {
  return TOTAL_MEMORY;
}

// Python has storages, operators have tensors: `whole` is any tensor on the storage.
void resize_storage_of(const at::Tensor& whole, int64_t bytes) {
  resize_storage(whole.storage(), bytes);
}

TORCH_LIBRARY(simulated_cuda, library) {
  library.def("counters() -> int[]", read_counters);
  library.def("set_memory_fraction(float fraction, int index) -> ()", set_memory_fraction);
  library.def("memory_fraction(int index) -> float", memory_fraction);
  library.def("device_count() -> int", device_count);
  library.def("total_memory() -> int", total_memory);
  library.def("resize_storage_of(Tensor whole, int bytes) -> ()", resize_storage_of);
}

} // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, HooksOfCuda)
}
