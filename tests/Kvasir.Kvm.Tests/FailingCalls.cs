using System.Threading;

namespace Kvasir.Kvm.Tests;

/// <summary>The host's KVM, with one call that fails; and the books of what was opened and mapped.</summary>
internal sealed unsafe class FailingCalls(int failing, int error) : IKvmCalls
{
    private readonly LinuxKvmCalls _calls = LinuxKvmCalls.Instance;
    private int _count;
    private int _open;

    /// <summary>Calls that can fail, so far.</summary>
    public int Count => _count;

    /// <summary>Descriptors and mappings that are still there.</summary>
    public int Open => _open;

    public bool Fired => _count > failing;

    int IKvmCalls.Open(string path) => Next() ? -error : Opened(_calls.Open(path));

    public int Ioctl(int fd, KvmRequest request, void* argument) => Next() ? -error : _calls.Ioctl(fd, request, argument);

    public int Ioctl(int fd, KvmRequest request, ulong argument)
    {
        // A capability that cannot be asked for is one that is not there: no failure.
        if (request == KvmRequest.CheckExtension)
            return _calls.Ioctl(fd, request, argument);
        if (Next())
            return -error;
        int result = _calls.Ioctl(fd, request, argument);
        return request is KvmRequest.CreateVm or KvmRequest.CreateVcpu ? Opened(result) : result;
    }

    public int Map(int fd, ulong offset, ulong length, out byte* address)
    {
        if (Next())
        {
            address = null;
            return -error;
        }
        return Opened(_calls.Map(fd, offset, length, out address));
    }

    public void Unmap(byte* address, ulong length)
    {
        Interlocked.Decrement(ref _open);
        _calls.Unmap(address, length);
    }

    public void Close(int fd)
    {
        Interlocked.Decrement(ref _open);
        _calls.Close(fd);
    }

    private bool Next() => Interlocked.Increment(ref _count) - 1 == failing;

    private int Opened(int result)
    {
        if (result >= 0)
            Interlocked.Increment(ref _open);
        return result;
    }
}
