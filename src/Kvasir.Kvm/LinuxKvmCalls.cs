using System.Runtime.InteropServices;

namespace Kvasir.Kvm;

/// <summary>The host's own KVM.</summary>
public sealed unsafe partial class LinuxKvmCalls : IKvmCalls
{
    private const int ReadWriteCloseOnExec = 0x8_0002;
    private const int ReadAndWrite = 3;
    private const int Shared = 1;

    private LinuxKvmCalls()
    {
    }

    public static LinuxKvmCalls Instance { get; } = new();

    public int Open(string path) => Result(open(path, ReadWriteCloseOnExec));

    public int Ioctl(int fd, KvmRequest request, void* argument) => Result(ioctl(fd, (nuint)request, (nuint)argument));

    public int Ioctl(int fd, KvmRequest request, ulong argument) => Result(ioctl(fd, (nuint)request, (nuint)argument));

    public int Map(int fd, ulong offset, ulong length, out byte* address)
    {
        nint result = mmap(0, (nuint)length, ReadAndWrite, Shared, fd, (long)offset);
        if (result == -1)
        {
            address = null;
            return -Marshal.GetLastPInvokeError();
        }
        address = (byte*)result;
        return 0;
    }

    public void Unmap(byte* address, ulong length) => _ = munmap((nint)address, (nuint)length);

    public void Close(int fd) => _ = close(fd);

    private static int Result(int value) => value >= 0 ? value : -Marshal.GetLastPInvokeError();

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int open(string path, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ioctl(int fd, nuint request, nuint argument);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint mmap(nint address, nuint length, int protection, int flags, int fd, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int munmap(nint address, nuint length);

    [LibraryImport("libc")]
    private static partial int close(int fd);
}
