using System;
using System.Buffers.Binary;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Kvasir.Kvm;

namespace Kvasir.Machine;

/// <summary>
/// A local APIC that KVM keeps, through the board's own: that one is KVM's state for the moment of an access. What touches it is the start of the VM, and an
/// instruction that the software CPU executes in KVM's place.
/// </summary>
internal sealed class KernelLocalApic(LocalApic model) : ILocalApic, IMmioDevice
{
    private readonly byte[] _page = new byte[KvmVcpu.ApicPageSize];
    private KvmVcpu? _vcpu;

    /// <summary>KVM delivers interrupts by itself.</summary>
    public bool HasInterrupt => false;

    public ulong Base => Vcpu.GetApic(_page);

    public byte TaskPriorityClass
    {
        get => Access(static (apic, _) => apic.TaskPriorityClass, 0, writes: false);
        set => Access(static (apic, priority) => apic.TaskPriorityClass = priority, value, writes: true);
    }

    public long TscOffset { get; set; }

    public IMmioDevice Registers => this;

    private KvmVcpu Vcpu => _vcpu ?? throw new InvalidOperationException("the local APIC has no vCPU yet");

    public void Connect(KvmVcpu vcpu) => _vcpu = vcpu;

    /// <summary>Gives KVM the state that the board's APIC has.</summary>
    public void Load()
    {
        LocalApic.State state = model.Save();
        ApicPage.Write(model, _page);
        Vcpu.SetApic(state.Base, _page);
    }

    /// <summary>KVM's state, its timer included, in the board's terms.</summary>
    public LocalApic.State Take(VmClock clock)
    {
        LocalApic.State idle = model.Save();
        ulong apicBase = Vcpu.GetApic(_page);
        LocalApic.State state = ApicPage.Read(_page, apicBase, idle);
        Vcpu.GetState(out CpuState vcpu);
        state.TscOffset = vcpu.TscOffset;
        state.TscDeadline = Vcpu.TscDeadline;
        state.Expiry = LocalApic.ExpiryOf(state, ApicPage.Current(_page), clock);
        return state;
    }

    /// <summary>Gives KVM a state, its timer included.</summary>
    public void Give(LocalApic.State state)
    {
        LocalApic.State idle = model.Save();
        model.Restore(state);
        Load();
        model.Restore(idle);
        Vcpu.TscDeadline = state.TscDeadline;
    }

    public int Acknowledge() => -1;

    public bool TryReadMsr(uint msr, out ulong value)
    {
        (bool known, value) = Access(static (apic, number) => (apic.TryReadMsr(number, out ulong result), result), msr, writes: false);
        return known;
    }

    public bool TryWriteMsr(uint msr, ulong value) => Access(static (apic, write) => apic.TryWriteMsr(write.msr, write.value), (msr, value), writes: true);

    public void Init() => Access(static (apic, _) =>
    {
        apic.Init();
        return true;
    }, 0, writes: true);

    public ulong Read(ulong offset, AccessSize size) => Access(static (apic, at) => apic.Read(at.offset, at.size), (offset, size), writes: false);

    public void Write(ulong offset, AccessSize size, ulong value) => Access(static (apic, write) =>
    {
        apic.Write(write.offset, write.size, write.value);
        return true;
    }, (offset, size, value), writes: true);

    /// <summary>Has the board's APIC be KVM's for one access.</summary>
    private TResult Access<TArgument, TResult>(Func<LocalApic, TArgument, TResult> access, TArgument argument, bool writes)
    {
        LocalApic.State idle = model.Save();
        ulong apicBase = Vcpu.GetApic(_page);
        model.Restore(ApicPage.Read(_page, apicBase, idle));
        try
        {
            TResult result = access(model, argument);
            if (writes)
                Load();
            return result;
        }
        finally
        {
            // Its timer must not run beside KVM's.
            model.Restore(idle);
        }
    }
}

/// <summary>A local APIC's registers as a page (Intel SDM vol. 3, "Local APIC Register Address Map"), which KVM gives and takes.</summary>
internal static class ApicPage
{
    private const int Id = 0x20;
    private const int TaskPriority = 0x80;
    private const int LogicalDestination = 0xd0;
    private const int DestinationFormat = 0xe0;
    private const int Spurious = 0xf0;
    private const int InService = 0x100;
    private const int TriggerMode = 0x180;
    private const int Request = 0x200;
    private const int ErrorStatus = 0x280;
    private const int LvtCmci = 0x2f0;
    private const int Command = 0x300;
    private const int CommandHigh = 0x310;
    private const int LvtTimer = 0x320;
    private const int LvtThermal = 0x330;
    private const int LvtPerformance = 0x340;
    private const int LvtLint0 = 0x350;
    private const int LvtLint1 = 0x360;
    private const int LvtError = 0x370;
    private const int InitialCount = 0x380;
    private const int CurrentCount = 0x390;
    private const int DivideConfiguration = 0x3e0;

    private static readonly int[] s_plain =
        [0x30, TaskPriority, LogicalDestination, DestinationFormat, Spurious, ErrorStatus, Command, CommandHigh, LvtTimer, LvtThermal, LvtPerformance, LvtLint0, LvtLint1, LvtError, InitialCount, CurrentCount, DivideConfiguration];

    /// <summary>Fills the page from an APIC.</summary>
    public static void Write(LocalApic apic, Span<byte> page)
    {
        page.Clear();
        LocalApic.State state = apic.Save();
        bool wide = (state.Base & (ulong)ApicBase.X2Apic) != 0;
        Put(page, Id, wide ? apic.Id : apic.Id << 24);
        foreach (int offset in s_plain)
            Put(page, offset, (uint)apic.Read((ulong)offset, AccessSize.Dword));
        for (int i = 0; i < 8; i++)
        {
            Put(page, InService + i * 16, state.InService.Register(i));
            Put(page, TriggerMode + i * 16, state.TriggerMode.Register(i));
            Put(page, Request + i * 16, state.Request.Register(i));
        }
    }

    /// <summary>The state that a page holds.</summary>
    /// <param name="page">The registers.</param>
    /// <param name="apicBase">IA32_APIC_BASE.</param>
    /// <param name="other">What the page does not tell: pins, the deadline.</param>
    public static LocalApic.State Read(ReadOnlySpan<byte> page, ulong apicBase, LocalApic.State other)
    {
        LocalApic.State state = other;
        state.Base = apicBase;
        state.TaskPriority = (byte)Get(page, TaskPriority);
        state.LogicalDestination = Get(page, LogicalDestination);
        state.DestinationFormat = Get(page, DestinationFormat);
        state.Spurious = Get(page, Spurious);
        state.ErrorStatus = Get(page, ErrorStatus);
        state.InService = Vectors(page, InService);
        state.TriggerMode = Vectors(page, TriggerMode);
        state.Request = Vectors(page, Request);
        state.Command = Get(page, Command) | (ulong)Get(page, CommandHigh) << 32;
        state.LvtCmci = Get(page, LvtCmci);
        state.LvtTimer = Get(page, LvtTimer);
        state.LvtThermal = Get(page, LvtThermal);
        state.LvtPerformance = Get(page, LvtPerformance);
        state.LvtLint0 = Get(page, LvtLint0);
        state.LvtLint1 = Get(page, LvtLint1);
        state.LvtError = Get(page, LvtError);
        state.InitialCount = Get(page, InitialCount);
        state.DivideConfiguration = Get(page, DivideConfiguration);
        return state;
    }

    /// <summary>The timer's current count.</summary>
    public static uint Current(ReadOnlySpan<byte> page) => Get(page, CurrentCount);

    private static VectorSet Vectors(ReadOnlySpan<byte> page, int offset)
    {
        Span<ulong> words = stackalloc ulong[4];
        for (int i = 0; i < words.Length; i++)
            words[i] = Get(page, offset + i * 32) | (ulong)Get(page, offset + i * 32 + 16) << 32;
        return new VectorSet { Word0 = words[0], Word1 = words[1], Word2 = words[2], Word3 = words[3] };
    }

    private static void Put(Span<byte> page, int offset, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(page[offset..], value);

    private static uint Get(ReadOnlySpan<byte> page, int offset) => BinaryPrimitives.ReadUInt32LittleEndian(page[offset..]);
}
