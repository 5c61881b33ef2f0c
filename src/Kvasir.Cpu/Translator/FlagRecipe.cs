namespace Kvasir.Cpu;

/// <summary>How the guest's arithmetic flags follow from its registers, for who leaves translated code: see <see cref="FlagTracker"/>.</summary>
internal readonly struct FlagRecipe
{
    private readonly int _immediate;
    private readonly byte _code;
    private readonly byte _a;
    private readonly sbyte _b;
    private readonly bool _isTest;

    /// <summary>Of flags that memory does not hold.</summary>
    public FlagRecipe(in FlagTracker flags)
    {
        if (flags.Memory || !flags.HasRecipe)
            return;
        _code = DeferredFlags.Code(flags.Kind, flags.Width);
        _a = (byte)flags.A;
        _b = (sbyte)flags.B;
        _immediate = flags.Immediate;
        _isTest = flags.IsTest;
    }

    /// <summary>Memory holds the flags, or nobody wants them.</summary>
    public bool IsNone => _code == 0;

    /// <summary>What it was made of.</summary>
    public FlagTracker Tracker => new() { Kind = (FlagKind)(_code >> 2), Width = 1 << (_code & 3), A = _a, B = _b, Immediate = _immediate, IsTest = _isTest };

    /// <summary>Leaves the flags deferred in the state. The general registers are stored.</summary>
    public unsafe void Store(VcpuBlock* s)
    {
        if (IsNone)
            return;
        ulong b = _b < 0 ? (ulong)_immediate : s->Gpr[_b];
        s->FlagA = s->Gpr[_a];
        if (_isTest)
            s->FlagA &= _a == _b ? ulong.MaxValue : b;
        else if ((FlagKind)(_code >> 2) is FlagKind.Add or FlagKind.Compare or FlagKind.Subtract)
            s->FlagB = b;
        s->FlagKind = _code;
    }
}
