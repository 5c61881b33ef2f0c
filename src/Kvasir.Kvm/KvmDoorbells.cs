using System.Threading;
using Kvasir.Core;

namespace Kvasir.Kvm;

/// <summary>Has KVM signal event descriptors where the guest writes to doorbells (Documentation/virt/kvm/api.rst, KVM_IOEVENTFD).</summary>
internal sealed unsafe class KvmDoorbells(KvmVm vm) : IDoorbellTaker
{
    private int _taken;

    /// <summary>Doorbells that KVM has now.</summary>
    public int Taken => Volatile.Read(ref _taken);

    public void Place(IDoorbellRegion region, ulong start)
    {
        foreach (Doorbell doorbell in region.Doorbells)
        {
            // Where KVM has no room for more, or two are at one address, the writes come to the device.
            if (Request(doorbell, start, 0))
                Interlocked.Increment(ref _taken);
        }
    }

    public void Remove(IDoorbellRegion region, ulong start)
    {
        foreach (Doorbell doorbell in region.Doorbells)
        {
            if (Request(doorbell, start, KvmIoEventFd.Deassign))
                Interlocked.Decrement(ref _taken);
        }
    }

    private bool Request(in Doorbell doorbell, ulong start, uint flags)
    {
        KvmIoEventFd request = new()
        {
            Address = start + doorbell.Offset,
            Length = doorbell.Size,
            Match = doorbell.Match ?? 0,
            Fd = doorbell.Bell.Fd,
            Flags = flags | (doorbell.Match is null ? 0 : KvmIoEventFd.MatchData),
        };
        return vm.Calls.Ioctl(vm.Fd, KvmRequest.SetIoEventFd, &request) == 0;
    }
}
