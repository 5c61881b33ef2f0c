using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>Memory types, machine checks, and what describes one vendor's model.</content>
public sealed unsafe partial class MsrFile
{
    // MTRRs: eight variable ranges, fixed ranges, write combining.
    private const ulong MtrrCapabilities = 0x508;
    private const ulong MtrrDefTypeReserved = ~0xcfful;
    private const ulong MtrrBaseReserved = ~((1ul << PageWalker.PhysicalBits) - 1) | 0xf00;
    private const ulong MtrrMaskReserved = ~((1ul << PageWalker.PhysicalBits) - 1) | 0x7ff;

    // Machine checks: MCG_CTL present, ten banks.
    private const int Banks = 10;
    private const ulong McgCapabilities = 0x100 + Banks;
    private const uint LastBank = Msr.Mc0Ctl + Banks * 4 - 1;

    private ulong _mtrrDefType;
    private FixedMtrrs _mtrrFixed;
    private VariableMtrrs _mtrrVariable;
    private ulong _mcgStatus;
    private ulong _mcgCtl = ulong.MaxValue;
    private readonly ulong[] _bankControls = new ulong[Banks];
    private ulong _amdSyscfg;
    private ulong _amdHwcr;

    private static bool IsMemoryType(ulong type) => type is 0 or 1 or 4 or 5 or 6;

    private static int FixedIndex(uint number) => number switch
    {
        Msr.MtrrFix64k00000 => 0,
        Msr.MtrrFix16k80000 => 1,
        Msr.MtrrFix16kA0000 => 2,
        >= Msr.MtrrFix4kC0000 and <= Msr.MtrrFix4kF8000 => (int)(number - Msr.MtrrFix4kC0000) + 3,
        _ => -1,
    };

    private bool TryReadMtrr(uint number, out ulong value)
    {
        value = 0;
        switch (number)
        {
            case Msr.MtrrCap:
                value = MtrrCapabilities;
                return true;
            case Msr.MtrrDefType:
                value = _mtrrDefType;
                return true;
            case >= Msr.MtrrPhysBase0 and <= Msr.MtrrPhysMask7:
                value = _mtrrVariable[(int)(number - Msr.MtrrPhysBase0)];
                return true;
        }
        int index = FixedIndex(number);
        if (index < 0)
            return false;
        value = _mtrrFixed[index];
        return true;
    }

    /// <summary>True: the number is an MTRR's, and <paramref name="accepted"/> whether the value is allowed.</summary>
    private bool TryWriteMtrr(uint number, ulong value, out bool accepted)
    {
        accepted = false;
        switch (number)
        {
            case Msr.MtrrCap:
                return true;
            case Msr.MtrrDefType:
                accepted = (value & MtrrDefTypeReserved) == 0 && IsMemoryType(value & 0xff);
                if (accepted)
                    _mtrrDefType = value;
                return true;
            case >= Msr.MtrrPhysBase0 and <= Msr.MtrrPhysMask7:
                bool mask = (number & 1) != 0;
                accepted = mask ? (value & MtrrMaskReserved) == 0 : (value & MtrrBaseReserved) == 0 && IsMemoryType(value & 0xff);
                if (accepted)
                    _mtrrVariable[(int)(number - Msr.MtrrPhysBase0)] = value;
                return true;
        }
        int index = FixedIndex(number);
        if (index < 0)
            return false;
        accepted = true;
        // On AMD bits 3 and 4 of each byte route accesses while SYSCFG lets them show; they are kept but route nothing.
        ulong typeMask = _vcpu.Model.IsAmd ? 7ul : 0xff;
        for (int i = 0; i < 8; i++)
            accepted &= IsMemoryType(value >> (i * 8) & typeMask);
        if (accepted)
            _mtrrFixed[index] = value;
        return true;
    }

    private bool TryReadMachineCheck(uint number, out ulong value)
    {
        value = 0;
        switch (number)
        {
            case Msr.P5McAddr or Msr.P5McType:
                return true;
            case Msr.McgCap:
                value = McgCapabilities;
                return true;
            case Msr.McgStatus:
                value = _mcgStatus;
                return true;
            case Msr.McgCtl:
                value = _mcgCtl;
                return true;
            case >= Msr.Mc0Ctl and <= LastBank:
                value = (number & 3) == 0 ? _bankControls[(number - Msr.Mc0Ctl) / 4] : 0;
                return true;
        }
        return false;
    }

    private bool TryWriteMachineCheck(uint number, ulong value, out bool accepted)
    {
        accepted = true;
        switch (number)
        {
            case Msr.P5McAddr or Msr.P5McType:
                return true;
            case Msr.McgCap:
                accepted = false;
                return true;
            case Msr.McgStatus:
                _mcgStatus = value;
                return true;
            case Msr.McgCtl:
                accepted = value is 0 or ulong.MaxValue;
                if (accepted)
                    _mcgCtl = value;
                return true;
            case >= Msr.Mc0Ctl and <= LastBank:
                if ((number & 3) == 0)
                    _bankControls[(number - Msr.Mc0Ctl) / 4] = value;
                else
                    accepted = value == 0 || (number & 3) != 1;
                return true;
        }
        return false;
    }

    private bool TryReadModel(uint number, out ulong value)
    {
        value = 0;
        return _vcpu.Model.IsAmd ? TryReadAmd(number, ref value) : TryReadIntel(number, ref value);
    }

    private bool TryReadIntel(uint number, ref ulong value)
    {
        switch (number)
        {
            case IntelMsr.PlatformId or IntelMsr.PowerOn or IntelMsr.SmiCount or IntelMsr.PerfStatus or IntelMsr.PerfControl or IntelMsr.FeaturesEnables:
                return true;
            case Msr.UcodeRevision:
                value = 1ul << 32;
                return true;
            case Msr.FeatureControl:
                // Locked, with VMX off.
                value = 1;
                return true;
            case IntelMsr.CoreThreadCount:
                value = (ulong)(uint)_vcpu.Model.Vcpus * 0x1_0001;
                return true;
            case IntelMsr.PlatformInfo:
                value = _vcpu.Clock.TscFrequency / 100_000_000 << 8;
                return true;
            case Msr.ArchCapabilities when _vcpu.Model.Has(CpuFeature.ArchCapabilities):
                value = CpuModel.ArchCapabilitiesValue;
                return true;
            default:
                return false;
        }
    }

    private bool TryReadAmd(uint number, ref ulong value)
    {
        switch (number)
        {
            case Msr.UcodeRevision:
                value = 0x0100_0065;
                return true;
            case Msr.AmdSyscfg:
                value = _amdSyscfg;
                return true;
            case Msr.AmdHwcr:
                // TscFreqSel: the counter does not follow the core's clock.
                value = _amdHwcr | 1u << 24;
                return true;
            case Msr.AmdDeCfg:
                // LFENCE serializes.
                value = 2;
                return true;
            case >= AmdMsr.EventSelectFirst and <= AmdMsr.CounterLast:
            case AmdMsr.TopMem or AmdMsr.TopMem2 or AmdMsr.NbCfg or AmdMsr.McRedirect or AmdMsr.IntPending or AmdMsr.MmioConfig:
            case >= AmdMsr.PstateFirst and <= AmdMsr.PstateLast:
            case AmdMsr.SmmAddr or AmdMsr.SmmMask or Msr.AmdOsvwLength or Msr.AmdOsvwStatus:
            case >= AmdMsr.CoreConfigFirst and <= AmdMsr.CoreConfigLast:
                return true;
            default:
                return false;
        }
    }

    /// <summary>True: the number is one of the vendor's, and <paramref name="accepted"/> whether writing it is allowed.</summary>
    private bool TryWriteModel(uint number, ulong value, out bool accepted)
    {
        accepted = true;
        if (_vcpu.Model.IsAmd)
        {
            switch (number)
            {
                case Msr.AmdSyscfg:
                    _amdSyscfg = value;
                    return true;
                case Msr.AmdHwcr:
                    _amdHwcr = value;
                    return true;
                case Msr.UcodeRevision or Msr.AmdPatchLoader:
                    return true;
            }
            ulong unused = 0;
            return TryReadAmd(number, ref unused);
        }
        switch (number)
        {
            case Msr.UcodeRevision or Msr.UcodeUpdate or IntelMsr.PerfControl or IntelMsr.PowerOn:
                return true;
            case IntelMsr.FeaturesEnables:
                accepted = value == 0;
                return true;
            case Msr.FeatureControl or Msr.ArchCapabilities or IntelMsr.PlatformInfo or IntelMsr.PlatformId or IntelMsr.CoreThreadCount:
                accepted = false;
                return true;
            default:
                return false;
        }
    }

    /// <summary>Numbers that only Intel's models have.</summary>
    private static class IntelMsr
    {
        public const uint PlatformId = Msr.PlatformId;
        public const uint PowerOn = 0x2a;
        public const uint SmiCount = 0x34;
        public const uint CoreThreadCount = 0x35;
        public const uint PlatformInfo = 0xce;
        public const uint FeaturesEnables = 0x140;
        public const uint PerfStatus = 0x198;
        public const uint PerfControl = 0x199;
    }

    /// <summary>Numbers that only AMD's models have.</summary>
    private static class AmdMsr
    {
        public const uint EventSelectFirst = 0xc001_0000;
        public const uint CounterLast = 0xc001_0007;
        public const uint TopMem = 0xc001_001a;
        public const uint TopMem2 = 0xc001_001d;
        public const uint NbCfg = 0xc001_001f;
        public const uint McRedirect = 0xc001_0022;
        public const uint IntPending = 0xc001_0055;
        public const uint MmioConfig = 0xc001_0058;
        public const uint PstateFirst = 0xc001_0061;
        public const uint PstateLast = 0xc001_006b;
        public const uint SmmAddr = 0xc001_0112;
        public const uint SmmMask = 0xc001_0113;
        public const uint CoreConfigFirst = 0xc001_1020;
        public const uint CoreConfigLast = 0xc001_102f;
    }
}
