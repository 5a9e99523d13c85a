// A CUDA device for a torch that was built without one: a guard that does nothing, and hooks that say the device is
// there. With them autograd, autocast and modules take tensors of cuda:0; no kernel comes with it (see card.py).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device card(DeviceType::CUDA, 0);
const Stream stream(Stream::DEFAULT, card);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return card; }
  Device getDevice() const override { return card; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream exchangeStream(Stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

}  // namespace

// Installs both for the rest of the process. Returns 1 if torch now says that CUDA is there.
extern "C" int install_card() {
  auto& guards = c10::impl::device_guard_impl_registry;
  guards[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
  // torch made its hooks while it was imported, and keeps them. They are an object without members, so another
  // table of functions makes them ours.
  static Hooks hooks{at::CUDAHooksArgs{}};
  auto& kept = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  auto* ours = static_cast<at::CUDAHooksInterface*>(&hooks);
  *reinterpret_cast<void**>(&kept) = *reinterpret_cast<void**>(ours);
  return at::detail::getCUDAHooks().hasCUDA();
}
