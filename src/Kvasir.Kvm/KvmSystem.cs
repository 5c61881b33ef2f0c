using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <summary>An open /dev/kvm and what it offers.</summary>
public sealed unsafe class KvmSystem : IDisposable
{
    public const string DevicePath = "/dev/kvm";

    /// <summary>The only version of the interface there ever was since it became stable.</summary>
    private const int ApiVersion = 12;
    private const int MostCpuidEntries = 1024;
    private const int MostMsrs = 4096;

    // State
    private int _fd;

    /// <exception cref="LinuxException">The device is missing, may not be opened, or is no KVM that can be used.</exception>
    public KvmSystem(IKvmCalls? calls = null, string path = DevicePath)
    {
        Calls = calls ?? LinuxKvmCalls.Instance;
        KickSignal.EnsureInstalled();
        _fd = Calls.Open(path);
        if (_fd < 0)
            throw new LinuxException($"open {path}", -_fd);
        try
        {
            int version = Check(Calls.Ioctl(_fd, KvmRequest.GetApiVersion, 0), "ask KVM for its version");
            if (version != ApiVersion)
                throw new LinuxException($"{path} speaks version {version} of the KVM interface; {ApiVersion} is needed");
            Span<KvmCapability> needed = [KvmCapability.UserMemory, KvmCapability.ImmediateExit, KvmCapability.VcpuEvents, KvmCapability.Xsave, KvmCapability.DebugRegisters];
            foreach (KvmCapability capability in needed)
            {
                if (Capability(capability) <= 0)
                    throw new LinuxException($"the host's KVM lacks {capability}, which Linux 4.12 and later offer");
            }
            VcpuMapSize = Check(Calls.Ioctl(_fd, KvmRequest.GetVcpuMapSize, 0), "ask KVM for the size of a vCPU's shared page");
            if (VcpuMapSize < sizeof(KvmRunPage))
                throw new LinuxException($"KVM shares {VcpuMapSize} bytes for each vCPU, less than its interface needs");
            SupportedCpuid = ReadSupportedCpuid();
            MsrList = ReadMsrList();
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public IKvmCalls Calls { get; }

    internal int Fd => _fd;

    internal int VcpuMapSize { get; }

    /// <summary>What KVM can offer a guest through CPUID.</summary>
    public IReadOnlyList<CpuidEntry> SupportedCpuid { get; }

    /// <summary>Model-specific registers that hold guest state.</summary>
    public IReadOnlySet<uint> MsrList { get; }

    /// <summary>A capability's value; 0 where it is not offered.</summary>
    public int Capability(KvmCapability capability) => Math.Max(0, Calls.Ioctl(_fd, KvmRequest.CheckExtension, (ulong)capability));

    public void Dispose()
    {
        if (_fd < 0)
            return;
        Calls.Close(_fd);
        _fd = -1;
    }

    /// <summary>Gives a call's result back, or throws where it failed.</summary>
    internal static int Check(int result, string action) => result >= 0 ? result : throw new LinuxException(action, -result);

    private CpuidEntry[] ReadSupportedCpuid()
    {
        for (int room = 128; ; room *= 2)
        {
            byte* buffer = (byte*)NativeMemory.AllocZeroed((nuint)(8 + room * sizeof(KvmCpuidEntry)));
            try
            {
                // SAFETY: a count, four bytes of padding, then as many entries as the count says.
                *(uint*)buffer = (uint)room;
                int result = Calls.Ioctl(_fd, KvmRequest.GetSupportedCpuid, buffer);
                if (result == -Errno.TooBig && room < MostCpuidEntries)
                    continue;
                Check(result, "ask KVM for the processor features it offers");
                CpuidEntry[] entries = new CpuidEntry[Math.Min(*(uint*)buffer, (uint)room)];
                KvmCpuidEntry* raw = (KvmCpuidEntry*)(buffer + 8);
                for (int i = 0; i < entries.Length; i++)
                {
                    entries[i] = new CpuidEntry(
                        raw[i].Function, raw[i].Index, (raw[i].Flags & KvmCpuidEntry.SignificantIndex) != 0, raw[i].Eax, raw[i].Ebx, raw[i].Ecx, raw[i].Edx);
                }
                return entries;
            }
            finally
            {
                NativeMemory.Free(buffer);
            }
        }
    }

    private HashSet<uint> ReadMsrList()
    {
        uint* buffer = (uint*)NativeMemory.AllocZeroed((MostMsrs + 1) * sizeof(uint));
        try
        {
            // SAFETY: a count, then as many numbers as it says.
            buffer[0] = MostMsrs;
            Check(Calls.Ioctl(_fd, KvmRequest.GetMsrIndexList, buffer), "ask KVM for its model-specific registers");
            HashSet<uint> list = [];
            for (uint i = 0; i < Math.Min(buffer[0], MostMsrs); i++)
                list.Add(buffer[1 + i]);
            return list;
        }
        finally
        {
            NativeMemory.Free(buffer);
        }
    }
}
