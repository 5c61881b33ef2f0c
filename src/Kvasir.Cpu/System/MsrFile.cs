using System;
using System.Collections.Generic;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Model-specific registers (Intel SDM vol. 4; AMD64 APM vol. 2, appendix A).</summary>
public sealed unsafe partial class MsrFile
{
    private const ulong PatReserved = 0xf8f8_f8f8_f8f8_f8f8;

    // Wiring
    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;
    private readonly HashSet<uint> _reported = [];

    internal MsrFile(SoftVcpu vcpu, VcpuBlock* block)
    {
        _vcpu = vcpu;
        _s = block;
    }

    /// <summary>Hears once of each number that is not known, with what was done about it: #GP.</summary>
    public Action<string>? Log { get; set; }

    // State
    internal ulong Star { get; set; }

    internal ulong Lstar { get; set; }

    internal ulong Cstar { get; set; }

    internal ulong Fmask { get; set; }

    internal ulong KernelGsBase { get; set; }

    internal ulong SysenterCs { get; set; }

    internal ulong SysenterEsp { get; set; }

    internal ulong SysenterEip { get; set; }

    internal ulong Pat { get; set; }

    internal ulong TscAux { get; set; }

    private ulong _tscAdjust;
    private ulong _xss;
    private ulong _miscEnable;
    private ulong _specCtrl;
    private ulong _debugCtl;

    /// <summary>Reads a register. False: it raises #GP(0).</summary>
    public bool TryRead(uint number, out ulong value)
    {
        switch (number)
        {
            case Msr.Tsc:
                value = _vcpu.Tsc;
                return true;
            case Msr.TscAdjust:
                value = _tscAdjust;
                return true;
            case Msr.ApicBase or Msr.TscDeadline:
            case >= Msr.X2ApicFirst and <= Msr.X2ApicLast:
                return _vcpu.Apic.TryReadMsr(number, out value);
            case Msr.Efer:
                value = _s->Efer;
                return true;
            case Msr.Star:
                value = Star;
                return true;
            case Msr.Lstar:
                value = Lstar;
                return true;
            case Msr.Cstar:
                value = Cstar;
                return true;
            case Msr.Fmask:
                value = Fmask;
                return true;
            case Msr.FsBase:
                value = _s->SegBase[SegmentLoads.Fs];
                return true;
            case Msr.GsBase:
                value = _s->SegBase[SegmentLoads.Gs];
                return true;
            case Msr.KernelGsBase:
                value = KernelGsBase;
                return true;
            case Msr.TscAux:
                value = TscAux;
                return true;
            case Msr.SysenterCs:
                value = SysenterCs;
                return true;
            case Msr.SysenterEsp:
                value = SysenterEsp;
                return true;
            case Msr.SysenterEip:
                value = SysenterEip;
                return true;
            case Msr.Pat:
                value = Pat;
                return true;
            case Msr.MiscEnable when !_vcpu.Model.IsAmd:
                value = _miscEnable;
                return true;
            case Msr.SpecCtrl when _vcpu.Model.HasSpecCtrl:
                value = _specCtrl;
                return true;
            case Msr.DebugCtl:
                value = _debugCtl;
                return true;
            case Msr.Xss when _vcpu.Model.Has(CpuFeature.Xsaves):
                value = _xss;
                return true;
        }
        if (TryReadMtrr(number, out value) || TryReadMachineCheck(number, out value) || TryReadModel(number, out value))
            return true;
        return Unknown(number, "read");
    }

    /// <summary>Writes a register. False: it raises #GP(0).</summary>
    public bool TryWrite(uint number, ulong value)
    {
        switch (number)
        {
            case Msr.Tsc:
                SetTsc(value);
                return true;
            case Msr.TscAdjust:
                _vcpu.TscOffset += (long)(value - _tscAdjust);
                _tscAdjust = value;
                return true;
            case Msr.ApicBase:
                return TryWriteApicBase(value);
            case Msr.TscDeadline:
            case >= Msr.X2ApicFirst and <= Msr.X2ApicLast:
                return _vcpu.Apic.TryWriteMsr(number, value);
            case Msr.Efer:
                return ControlRegisterWrites.TryWriteEfer(_vcpu, value);
            case Msr.Star:
                Star = value;
                return true;
            case Msr.Lstar when Mmu.IsCanonical(value):
                Lstar = value;
                return true;
            case Msr.Cstar when Mmu.IsCanonical(value):
                Cstar = value;
                return true;
            case Msr.Fmask when value >> 32 == 0:
                Fmask = value;
                return true;
            case Msr.FsBase when Mmu.IsCanonical(value):
                _s->SegBase[SegmentLoads.Fs] = value;
                return true;
            case Msr.GsBase when Mmu.IsCanonical(value):
                _s->SegBase[SegmentLoads.Gs] = value;
                return true;
            case Msr.KernelGsBase when Mmu.IsCanonical(value):
                KernelGsBase = value;
                return true;
            case Msr.TscAux when value >> 32 == 0:
                TscAux = value;
                return true;
            case Msr.SysenterCs:
                SysenterCs = (uint)value;
                return true;
            case Msr.SysenterEsp when Mmu.IsCanonical(value):
                SysenterEsp = value;
                return true;
            case Msr.SysenterEip when Mmu.IsCanonical(value):
                SysenterEip = value;
                return true;
            case Msr.Pat:
                return TryWritePat(value);
            case Msr.MiscEnable when !_vcpu.Model.IsAmd:
                _miscEnable = value;
                return true;
            case Msr.SpecCtrl when _vcpu.Model.HasSpecCtrl && value <= 0x7:
                _specCtrl = value;
                return true;
            case Msr.PredCmd when _vcpu.Model.HasSpecCtrl && value <= 1:
                // Nothing is predicted on the guest's behalf: there is nothing to flush.
                return true;
            case Msr.DebugCtl when value <= 3:
                _debugCtl = value;
                return true;
            case Msr.Xss when _vcpu.Model.Has(CpuFeature.Xsaves) && value == 0:
                _xss = value;
                return true;
            case Msr.Lstar or Msr.Cstar or Msr.Fmask or Msr.FsBase or Msr.GsBase or Msr.KernelGsBase or Msr.TscAux or Msr.SysenterEsp or Msr.SysenterEip:
                return false;
        }
        if (TryWriteMtrr(number, value, out bool accepted) || TryWriteMachineCheck(number, value, out accepted) || TryWriteModel(number, value, out accepted))
            return accepted;
        return Unknown(number, "write");
    }

    private void SetTsc(ulong value)
    {
        // The counter and its adjustment move together (Intel SDM vol. 3, "IA32_TSC_ADJUST").
        long change = (long)(value - _vcpu.Tsc);
        _vcpu.TscOffset += change;
        _tscAdjust += (ulong)change;
    }

    private bool TryWriteApicBase(ulong value)
    {
        if (!_vcpu.Apic.TryWriteMsr(Msr.ApicBase, value))
            return false;
        // Its page may have moved or appeared over RAM.
        _vcpu.Mmu.FlushAll();
        return true;
    }

    private bool TryWritePat(ulong value)
    {
        if ((value & PatReserved) != 0)
            return false;
        for (int i = 0; i < 8; i++)
        {
            if ((value >> (i * 8) & 7) is 2 or 3)
                return false;
        }
        Pat = value;
        return true;
    }

    private bool Unknown(uint number, string access)
    {
        if (_reported.Count < 256 && _reported.Add(number))
            Log?.Invoke($"vCPU {_vcpu.Index}: {access} of unknown MSR {number:x}h at {_s->BlockRip:x}h: #GP");
        return false;
    }

    internal void Get(ref CpuState state)
    {
        state.Star = Star;
        state.Lstar = Lstar;
        state.Cstar = Cstar;
        state.Fmask = Fmask;
        state.KernelGsBase = KernelGsBase;
        state.SysenterCs = SysenterCs;
        state.SysenterEsp = SysenterEsp;
        state.SysenterEip = SysenterEip;
        state.Pat = Pat;
        state.TscAux = TscAux;
        state.TscAdjust = _tscAdjust;
        state.Xss = _xss;
        state.MiscEnable = _miscEnable;
        state.SpecCtrl = _specCtrl;
        state.MtrrDefType = _mtrrDefType;
        state.MtrrFixed = _mtrrFixed;
        state.MtrrVariable = _mtrrVariable;
    }

    internal void Set(in CpuState state)
    {
        Star = state.Star;
        Lstar = state.Lstar;
        Cstar = state.Cstar;
        Fmask = state.Fmask;
        KernelGsBase = state.KernelGsBase;
        SysenterCs = state.SysenterCs;
        SysenterEsp = state.SysenterEsp;
        SysenterEip = state.SysenterEip;
        Pat = state.Pat;
        TscAux = state.TscAux;
        _tscAdjust = state.TscAdjust;
        _xss = state.Xss;
        _miscEnable = state.MiscEnable;
        _specCtrl = state.SpecCtrl;
        _mtrrDefType = state.MtrrDefType;
        _mtrrFixed = state.MtrrFixed;
        _mtrrVariable = state.MtrrVariable;
    }
}
