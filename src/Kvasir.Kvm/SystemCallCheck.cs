using System;
using System.Buffers.Binary;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <summary>
/// A tiny 64-bit guest that makes a system call from ring 3: whether SYSCALL changes to ring 0. On a page-table based KVM (<c>kvm_pvm</c>) it was seen to go to
/// LSTAR in ring 3.
/// </summary>
internal static class SystemCallCheck
{
    private const ushort EndPort = 0x80;
    private const ulong Tables = 0x1000;
    private const ulong Idt = 0x4000;
    private const ulong Gdt = 0x5000;
    private const ulong Tss = 0x5800;
    private const ulong Kernel = 0x6000;
    private const ulong Faulted = 0x6100;
    private const ulong Stack = 0x8000;
    private const ulong User = 0x20_0000;
    private const int Gates = 32;
    private const ushort KernelCode = 0x8;
    private const ushort UserData = 0x1b;
    private const ushort UserCode = 0x23;
    private const ushort TaskSelector = 0x28;

    // Entered by the system call and by a fault: mov al, 1 or 2; out 80h, al; jmp -2
    private static readonly byte[] s_kernel = [0xb0, 1, 0xe6, 0x80, 0xeb, 0xfe];
    private static readonly byte[] s_faulted = [0xb0, 2, 0xe6, 0x80, 0xeb, 0xfe];
    private static readonly byte[] s_user = [0x0f, 0x05, 0xeb, 0xfe];

    /// <summary>Whether SYSCALL stays in ring 3 on this KVM. Takes about a millisecond.</summary>
    /// <exception cref="Linux.LinuxException">KVM refused.</exception>
    public static bool StaysInRing3(KvmSystem system)
    {
        using SpeedLoop parts = new();
        using GuestMemory memory = new(4ul << 20, "syscall-check");
        Prepare(memory);
        using KvmVm vm = new(system, memory);
        PortBus ports = new();
        using KvmVcpu vcpu = vm.CreateVcpu(0, new KvmVcpuWiring
        {
            Ports = ports,
            Mmio = parts.Mmio,
            Apic = parts.Apic,
            Clock = parts.Clock,
            Cpuid = system.SupportedCpuid,
            Signature = 0,
        });
        Verdict verdict = new(vcpu);
        ports.Map(EndPort, 1, verdict);
        CpuState state = Start();
        vcpu.SetState(in state);
        // A guest that gets nowhere is none of this quirk.
        return vcpu.Run() == VcpuExit.Kicked && verdict.Value == s_faulted[1];
    }

    private static void Prepare(GuestMemory memory)
    {
        const ulong link = (ulong)(PageEntry.Present | PageEntry.Writable | PageEntry.User);
        memory.TryWrite(new Gpa(Tables), Tables + 0x1000 | link);
        memory.TryWrite(new Gpa(Tables + 0x1000), Tables + 0x2000 | link);
        memory.TryWrite(new Gpa(Tables + 0x2000), (ulong)(PageEntry.Present | PageEntry.Writable | PageEntry.Large));
        memory.TryWrite(new Gpa(Tables + 0x2008), User | link | (ulong)PageEntry.Large);
        Span<ulong> descriptors = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff, 0x0000_8b00_0000_0067 | Tss << 16, 0];
        for (int i = 0; i < descriptors.Length; i++)
            memory.TryWrite(new Gpa(Gdt + (ulong)i * 8), descriptors[i]);
        // RSP0 is at offset 4 (Intel SDM vol. 3, "64-Bit TSS").
        Span<byte> stack = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(stack, Stack);
        memory.TryWrite(new Gpa(Tss + 4), stack);
        const ulong presentInterruptGate = 0x8e00_0000_0000;
        for (ulong i = 0; i < Gates; i++)
            memory.TryWrite(new Gpa(Idt + i * 16), Faulted | (ulong)KernelCode << 16 | presentInterruptGate);
        memory.TryWrite(new Gpa(Kernel), s_kernel);
        memory.TryWrite(new Gpa(Faulted), s_faulted);
        memory.TryWrite(new Gpa(User), s_user);
    }

    private static CpuState Start()
    {
        CpuState state = CpuState.AtReset();
        state.Rip = User;
        state.Gpr[4] = User + 0x1000;
        state.Cs = new SegmentState(UserCode, 0, uint.MaxValue, 0xa0fb);
        state.Ds = state.Es = state.Ss = state.Fs = state.Gs = new SegmentState(UserData, 0, uint.MaxValue, 0xc0f3);
        state.Tr = new SegmentState(TaskSelector, Tss, 0x67, 0x8b);
        state.Gdtr = new TableState(Gdt, 7 * 8 - 1);
        state.Idtr = new TableState(Idt, Gates * 16 - 1);
        state.Cr0 = (ulong)(Cr0.PE | Cr0.ET | Cr0.NE | Cr0.PG);
        state.Cr3 = Tables;
        state.Cr4 = (ulong)Cr4.PAE;
        state.Efer = (ulong)(Efer.LME | Efer.LMA | Efer.SCE);
        state.Star = (ulong)(UserData - 8) << 48 | (ulong)KernelCode << 32;
        state.Lstar = Kernel;
        return state;
    }

    private sealed class Verdict(IVcpu vcpu) : IPortDevice
    {
        public uint Value { get; private set; }

        public uint ReadPort(ushort port, AccessSize size) => 0xff;

        public void WritePort(ushort port, AccessSize size, uint value)
        {
            Value = value;
            vcpu.Kick();
        }
    }
}
