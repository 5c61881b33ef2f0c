namespace Kvasir.X86;

/// <summary>Numbers of model-specific registers (Intel SDM vol. 4; AMD64 APM vol. 2, appendix A).</summary>
public static class Msr
{
    public const uint P5McAddr = 0x0;
    public const uint P5McType = 0x1;
    public const uint Tsc = 0x10;
    public const uint PlatformId = 0x17;
    public const uint ApicBase = 0x1b;
    public const uint FeatureControl = 0x3a;
    public const uint TscAdjust = 0x3b;
    public const uint SpecCtrl = 0x48;
    public const uint PredCmd = 0x49;
    public const uint UcodeUpdate = 0x79;
    public const uint UcodeRevision = 0x8b;
    public const uint Mperf = 0xe7;
    public const uint Aperf = 0xe8;
    public const uint MtrrCap = 0xfe;
    public const uint ArchCapabilities = 0x10a;
    public const uint SysenterCs = 0x174;
    public const uint SysenterEsp = 0x175;
    public const uint SysenterEip = 0x176;
    public const uint McgCap = 0x179;
    public const uint McgStatus = 0x17a;
    public const uint McgCtl = 0x17b;
    public const uint MiscEnable = 0x1a0;
    public const uint DebugCtl = 0x1d9;
    public const uint MtrrPhysBase0 = 0x200;
    public const uint MtrrPhysMask7 = 0x20f;
    public const uint MtrrFix64k00000 = 0x250;
    public const uint MtrrFix16k80000 = 0x258;
    public const uint MtrrFix16kA0000 = 0x259;
    public const uint MtrrFix4kC0000 = 0x268;
    public const uint MtrrFix4kF8000 = 0x26f;
    public const uint Pat = 0x277;
    public const uint MtrrDefType = 0x2ff;
    public const uint Mc0Ctl = 0x400;
    public const uint TscDeadline = 0x6e0;
    public const uint X2ApicFirst = 0x800;
    public const uint X2ApicLast = 0x8ff;
    public const uint Xss = 0xda0;
    public const uint Efer = 0xc000_0080;
    public const uint Star = 0xc000_0081;
    public const uint Lstar = 0xc000_0082;
    public const uint Cstar = 0xc000_0083;
    public const uint Fmask = 0xc000_0084;
    public const uint FsBase = 0xc000_0100;
    public const uint GsBase = 0xc000_0101;
    public const uint KernelGsBase = 0xc000_0102;
    public const uint TscAux = 0xc000_0103;
    public const uint AmdSyscfg = 0xc001_0010;
    public const uint AmdHwcr = 0xc001_0015;
    public const uint AmdPatchLoader = 0xc001_0020;
    public const uint AmdOsvwLength = 0xc001_0140;
    public const uint AmdOsvwStatus = 0xc001_0141;
    public const uint AmdDeCfg = 0xc001_1029;
}
