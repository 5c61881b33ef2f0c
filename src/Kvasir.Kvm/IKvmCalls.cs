namespace Kvasir.Kvm;

/// <summary>
/// The system calls that reach KVM: the seam at which tests make each of them fail. Results are what the kernel gives, or the negated error
/// number (errno(3)).
/// </summary>
public unsafe interface IKvmCalls
{
    /// <summary>Opens a device file to read and write.</summary>
    int Open(string path);

    int Ioctl(int fd, KvmRequest request, void* argument);

    int Ioctl(int fd, KvmRequest request, ulong argument);

    /// <summary>Maps a part of a vCPU's descriptor.</summary>
    /// <returns>0, or the negated error number.</returns>
    int Map(int fd, ulong offset, ulong length, out byte* address);

    void Unmap(byte* address, ulong length);

    void Close(int fd);
}
