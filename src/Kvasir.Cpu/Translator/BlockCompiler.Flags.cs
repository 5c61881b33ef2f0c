using System;

namespace Kvasir.Cpu;

/// <content>Arithmetic flags.</content>
internal sealed unsafe partial class BlockCompiler
{
    private const int Rax = 0;

    /// <summary>Makes memory hold the flags. Changes neither the host's flags nor T0.</summary>
    private void FlushFlags()
    {
        if (_flags.Memory)
            return;
        StoreFlags(in _flags);
        _flags.Memory = true;
    }

    /// <summary>The code that stores flags which memory does not hold.</summary>
    private void StoreFlags(in FlagTracker flags)
    {
        if (flags.HasRecipe)
        {
            StoreRecipe(in flags);
            return;
        }
        if (!flags.Host)
            throw new InvalidOperationException("the flags are nowhere");
        PackHostFlags();
    }

    private void PackHostFlags()
    {
        _a.Move(Layout.T1, Rax);
        _a.Byte(0x9f);
        _a.Byte(0x0f);
        _a.Byte(0x90);
        _a.Byte(0xc0);
        _a.Store(Layout.State, Layout.FlagA, Rax, 4);
        _a.Move(Rax, Layout.T1);
        StoreKind(FlagKind.Packed, 1);
    }

    private void StoreKind(FlagKind kind, int width) => _a.StoreImmediate(Layout.State, Layout.FlagKind, DeferredFlags.Code(kind, width), 1);

    private void StoreRecipe(in FlagTracker flags)
    {
        if (flags.IsTest && flags.A != flags.B)
        {
            LoadGuest(Layout.T1, flags.A);
            if (flags.B < 0)
                _a.ArithmeticImmediate(Alu.And, Layout.T1, flags.Immediate, flags.Width);
            else if (Layout.Host(flags.B) >= 0)
                _a.Arithmetic(Alu.And, Layout.T1, Layout.Host(flags.B), flags.Width);
            else
                _a.ArithmeticLoad(Alu.And, Layout.T1, Layout.State, Layout.Slot(flags.B), flags.Width);
            _a.Store(Layout.State, Layout.FlagA, Layout.T1);
        }
        else
        {
            StoreGuest(Layout.FlagA, flags.A);
            if (flags.Kind is FlagKind.Add or FlagKind.Compare or FlagKind.Subtract)
            {
                if (flags.B < 0)
                    _a.StoreImmediate(Layout.State, Layout.FlagB, flags.Immediate, flags.Width == 8 ? 8 : 4);
                else
                    StoreGuest(Layout.FlagB, flags.B);
            }
        }
        StoreKind(flags.Kind, flags.Width);
    }

    private void StoreGuest(int displacement, int guest)
    {
        int host = Layout.Host(guest);
        if (host < 0)
        {
            _a.Load(Layout.T1, Layout.State, Layout.Slot(guest));
            host = Layout.T1;
        }
        _a.Store(Layout.State, displacement, host);
    }

    /// <summary>Before code that changes the host's flags: what only they hold is stored, if it is needed.</summary>
    private void BeforeClobber(bool needed)
    {
        if (needed && !_flags.Memory && !_flags.HasRecipe)
            FlushFlags();
        _flags.Host = false;
    }

    /// <summary>Before an instruction that writes registers and leaves flags that are needed: a recipe that it spoils is stored.</summary>
    private void BeforeWrite(uint registers)
    {
        if (!_flags.DependsOn(registers))
            return;
        FlushFlags();
        _flags.Kind = FlagKind.None;
    }

    /// <summary>Makes the host's flags the guest's. Changes T1.</summary>
    private void EnsureHost()
    {
        if (_flags.Host)
            return;
        _flags.Host = true;
        if (!_flags.HasRecipe)
        {
            _a.CallTo(_stubs.FlagsToHost);
            return;
        }
        int width = _flags.Width;
        switch (_flags.Kind)
        {
            case FlagKind.Logic when _flags.IsTest:
                LoadGuest(Layout.T1, _flags.A);
                OperateB(Alu.And, Layout.T1, width);
                break;
            case FlagKind.Logic when Layout.Host(_flags.A) >= 0:
                _a.Test(Layout.Host(_flags.A), Layout.Host(_flags.A), width);
                break;
            case FlagKind.Logic:
                _a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.Slot(_flags.A), 0, width);
                break;
            case FlagKind.Compare when Layout.Host(_flags.A) >= 0:
                OperateB(Alu.Cmp, Layout.Host(_flags.A), width);
                break;
            case FlagKind.Compare:
                LoadGuest(Layout.T1, _flags.A);
                OperateB(Alu.Cmp, Layout.T1, width);
                break;
            case FlagKind.Add:
                LoadGuest(Layout.T1, _flags.A);
                OperateB(Alu.Sub, Layout.T1, width);
                OperateB(Alu.Add, Layout.T1, width);
                break;
            case FlagKind.Subtract:
                LoadGuest(Layout.T1, _flags.A);
                OperateB(Alu.Add, Layout.T1, width);
                OperateB(Alu.Cmp, Layout.T1, width);
                break;
            case FlagKind.Negate:
                LoadGuest(Layout.T1, _flags.A);
                _a.Unary(3, 3, Layout.T1, width);
                _a.Unary(3, 3, Layout.T1, width);
                break;
            case FlagKind.Increment or FlagKind.Decrement:
                bool increment = _flags.Kind == FlagKind.Increment;
                LoadGuest(Layout.T1, _flags.A);
                _a.Lea(Layout.T1, Layout.T1, increment ? -1 : 1);
                _a.BitTestMemory(Layout.State, Layout.FlagCarry, 0);
                _a.Unary(4, increment ? 0 : 1, Layout.T1, width);
                break;
            default:
                throw new InvalidOperationException("a recipe that nobody makes");
        }
    }

    private void OperateB(Alu operation, int to, int width)
    {
        if (_flags.B < 0)
            _a.ArithmeticImmediate(operation, to, _flags.Immediate, width);
        else if (Layout.Host(_flags.B) >= 0)
            _a.Arithmetic(operation, to, Layout.Host(_flags.B), width);
        else
            _a.ArithmeticLoad(operation, to, Layout.State, Layout.Slot(_flags.B), width);
    }

    private void LoadGuest(int to, int guest, int size = 8)
    {
        if (Layout.Host(guest) >= 0)
            _a.Move(to, Layout.Host(guest), size);
        else
            _a.Load(to, Layout.State, Layout.Slot(guest), size);
    }

    /// <summary>After an instruction that left all flags in the host's, and nowhere else: they are stored before something changes them.</summary>
    private void HostHoldsFlags()
    {
        _flags.Forget();
        _flags.Host = true;
    }

    /// <summary>After an instruction whose flags follow from registers.</summary>
    private void SetRecipe(FlagKind kind, int width, int a, int b, int immediate = 0, bool test = false)
    {
        HostHoldsFlags();
        _flags.Kind = kind;
        _flags.Width = width;
        _flags.A = a;
        _flags.B = b;
        _flags.Immediate = immediate;
        _flags.IsTest = test;
    }
}
