using System;
using Kvasir.Core;

namespace Kvasir.Kvm;

/// <content>A local APIC that is KVM's.</content>
public sealed unsafe partial class KvmVcpu
{
    /// <summary>Bytes of the register page that KVM gives and takes.</summary>
    public const int ApicPageSize = 1024;

    private enum KernelActivity : uint
    {
        Runnable = 0,
        Uninitialized = 1,
        InitReceived = 2,
        Halted = 3,
    }

    /// <summary>Takes out the registers of KVM's local APIC, laid out as in its page. Only while the vCPU is not running, or on its thread.</summary>
    /// <param name="page">Gets <see cref="ApicPageSize"/> bytes.</param>
    /// <returns>IA32_APIC_BASE.</returns>
    /// <exception cref="Linux.LinuxException">KVM refused.</exception>
    public ulong GetApic(Span<byte> page)
    {
        KvmLocalApicState state;
        Call(KvmRequest.GetLocalApic, &state, "read the local APIC");
        new ReadOnlySpan<byte>(&state, ApicPageSize).CopyTo(page);
        KvmSpecialRegisters special;
        Call(KvmRequest.GetSpecialRegisters, &special, "read the special registers");
        return special.ApicBase;
    }

    /// <summary>Puts them in.</summary>
    /// <inheritdoc cref="GetApic"/>
    public void SetApic(ulong apicBase, ReadOnlySpan<byte> page)
    {
        FlushRegisters();
        _registersShared = false;
        KvmSpecialRegisters special;
        Call(KvmRequest.GetSpecialRegisters, &special, "read the special registers");
        if (special.ApicBase != apicBase)
        {
            special.ApicBase = apicBase;
            special.Interrupts0 = special.Interrupts1 = special.Interrupts2 = special.Interrupts3 = 0;
            Call(KvmRequest.SetSpecialRegisters, &special, "write the special registers");
        }
        KvmLocalApicState state;
        page[..ApicPageSize].CopyTo(new Span<byte>(&state, ApicPageSize));
        Call(KvmRequest.SetLocalApic, &state, "write the local APIC");
    }

    private VcpuActivity ReadActivity()
    {
        KernelActivity activity;
        Call(KvmRequest.GetActivity, &activity, "read the activity");
        return activity switch
        {
            KernelActivity.Halted => VcpuActivity.Halted,
            KernelActivity.Uninitialized or KernelActivity.InitReceived => VcpuActivity.WaitForSipi,
            _ => VcpuActivity.Active,
        };
    }

    private void WriteActivity(VcpuActivity value)
    {
        _activity = value == VcpuActivity.Shutdown ? value : VcpuActivity.Active;
        KernelActivity activity = value switch
        {
            VcpuActivity.Halted => KernelActivity.Halted,
            VcpuActivity.WaitForSipi => KernelActivity.InitReceived,
            _ => KernelActivity.Runnable,
        };
        Call(KvmRequest.SetActivity, &activity, "write the activity");
    }
}
