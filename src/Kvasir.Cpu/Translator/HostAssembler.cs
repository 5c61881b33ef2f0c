using System;
using System.Buffers.Binary;
using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>Operations of the host's arithmetic group, by their number in the encoding (Intel SDM vol. 2, "One-Byte Opcode Map").</summary>
internal enum Alu
{
    Add = 0,
    Or = 1,
    Adc = 2,
    Sbb = 3,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// <summary>Conditions by their number in the encoding.</summary>
internal static class Condition
{
    public const int Overflow = 0;
    public const int Below = 2;
    public const int AboveOrEqual = 3;
    public const int Equal = 4;
    public const int NotEqual = 5;
    public const int BelowOrEqual = 6;
    public const int Above = 7;
    public const int NotSign = 9;
    public const int Parity = 10;
}

/// <summary>
/// Writes host machine code for the plumbing of translated code. Registers are their numbers, 0-15; sizes are in bytes. Code is assembled for the address
/// given to <see cref="Begin"/> and copied there by the caller.
/// </summary>
internal sealed class HostAssembler
{
    private byte[] _code = new byte[1 << 16];

    // State
    private int _length;

    public int Length => _length;

    /// <summary>Counts instructions that change T0: while it stays the same, so does what T0 holds.</summary>
    public int Writes { get; private set; }

    /// <summary>Where the code's first byte will be.</summary>
    public ulong Origin { get; private set; }

    /// <summary>What was assembled since <see cref="Begin"/>.</summary>
    public ReadOnlySpan<byte> Code => _code.AsSpan(0, _length);

    private void Changes(int register)
    {
        if (register == Layout.T0)
            Writes++;
        else if (register == Layout.T1)
            _mirrored = Nothing;
    }

    private const int Nothing = int.MinValue;
    private int _mirrored = Nothing;

    /// <summary>Displacement from the state of the quadword that T1 holds as well, or null: loads of it need no memory.</summary>
    public int? Mirrored => _mirrored == Nothing ? null : _mirrored;

    /// <summary>T1 may hold anything from here on: something was emitted that is not known here, or code comes here from elsewhere.</summary>
    public void ForgetMirror() => _mirrored = Nothing;

    private void StoresTo(int @base, int displacement, int size)
    {
        if (@base == Layout.State && displacement < _mirrored + 8 && displacement + size > _mirrored)
            _mirrored = Nothing;
    }

    private bool IsMirrored(int @base, int displacement) => @base == Layout.State && displacement == _mirrored;

    public void Begin(ulong origin)
    {
        Origin = origin;
        _length = 0;
        _mirrored = Nothing;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void Byte(int value)
    {
        if (_length >= _code.Length)
            Grow();
        _code[_length++] = (byte)value;
    }

    public void Dword(int value)
    {
        if (_length + sizeof(int) > _code.Length)
            Grow();
        BinaryPrimitives.WriteInt32LittleEndian(_code.AsSpan(_length), value);
        _length += sizeof(int);
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private void Grow() => Array.Resize(ref _code, _code.Length * 2);

    public void Qword(ulong value)
    {
        Dword((int)value);
        Dword((int)(value >> 32));
    }

    /// <summary>Pads with no-operations to a multiple of <paramref name="alignment"/> of the final address.</summary>
    public void Align(int alignment)
    {
        _mirrored = Nothing;
        int missing = (int)((ulong)alignment - ((Origin + (ulong)_length) & (ulong)(alignment - 1))) & (alignment - 1);
        Pad(missing);
    }

    /// <summary>Puts no-operations over what was assembled from one position to another.</summary>
    public void Overwrite(int from, int to)
    {
        int length = _length;
        _length = from;
        Pad(to - from);
        _length = length;
    }

    /// <summary>No-operations of as few instructions as possible.</summary>
    public void Pad(int bytes)
    {
        while (bytes > 0)
        {
            int n = Math.Min(bytes, 8);
            ReadOnlySpan<byte> nop = n switch
            {
                1 => [0x90],
                2 => [0x66, 0x90],
                3 => [0x0f, 0x1f, 0x00],
                4 => [0x0f, 0x1f, 0x40, 0x00],
                5 => [0x0f, 0x1f, 0x44, 0x00, 0x00],
                6 => [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
                7 => [0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
                _ => [0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
            };
            foreach (byte b in nop)
                Byte(b);
            bytes -= n;
        }
    }

    // Operands

    /// <summary>REX where one is needed. <paramref name="byteRegister"/>: a register whose low byte is meant, 4-7 of which need a REX.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private void Rex(int size, int reg, int index, int rm, int byteRegister = -1)
    {
        int rex = (size == 8 ? 8 : 0) | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1 | (rm >> 3 & 1);
        if (rex != 0 || byteRegister is >= 4 and <= 7)
            Byte(0x40 | rex);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private void ModRegister(int reg, int rm) => Byte(0xc0 | (reg & 7) << 3 | (rm & 7));

    private void ModMemory(int reg, int @base, int displacement)
    {
        int mod = displacement == 0 && (@base & 7) != 5 ? 0 : displacement is >= -128 and <= 127 ? 1 : 2;
        Byte(mod << 6 | (reg & 7) << 3 | (@base & 7));
        if ((@base & 7) == 4)
            Byte(0x24);
        Displacement(mod, displacement);
    }

    private void ModMemory(int reg, int @base, int index, int scale, int displacement)
    {
        if (@base < 0)
        {
            Byte((reg & 7) << 3 | 4);
            Byte(scale << 6 | (index & 7) << 3 | 5);
            Dword(displacement);
            return;
        }
        int mod = displacement == 0 && (@base & 7) != 5 ? 0 : displacement is >= -128 and <= 127 ? 1 : 2;
        Byte(mod << 6 | (reg & 7) << 3 | 4);
        Byte(scale << 6 | (index & 7) << 3 | (@base & 7));
        Displacement(mod, displacement);
    }

    private void Displacement(int mod, int displacement)
    {
        if (mod == 1)
            Byte(displacement);
        else if (mod == 2)
            Dword(displacement);
    }

    private void Prefix16(int size)
    {
        if (size == 2)
            Byte(0x66);
    }

    // Moves

    public void Move(int to, int from, int size = 8)
    {
        Changes(to);
        Rex(size, from, 0, to);
        Byte(0x89);
        ModRegister(from, to);
    }

    public void MoveImmediate(int to, ulong value)
    {
        Changes(to);
        if (value <= uint.MaxValue)
        {
            Rex(4, 0, 0, to);
            Byte(0xb8 | (to & 7));
            Dword((int)(uint)value);
        }
        else if ((long)value == (int)value)
        {
            Rex(8, 0, 0, to);
            Byte(0xc7);
            ModRegister(0, to);
            Dword((int)value);
        }
        else
        {
            Rex(8, 0, 0, to);
            Byte(0xb8 | (to & 7));
            Qword(value);
        }
    }

    /// <summary>Loads; 1 and 2 bytes are zero-extended.</summary>
    public void Load(int to, int @base, int displacement, int size = 8)
    {
        if (size >= 4 && IsMirrored(@base, displacement))
        {
            if (to != Layout.T1 || size != 8)
                Move(to, Layout.T1, size);
            return;
        }
        Changes(to);
        if (to == Layout.T1 && @base == Layout.State && size == 8)
            _mirrored = displacement;
        Rex(size, to, 0, @base);
        if (size >= 4)
        {
            Byte(0x8b);
        }
        else
        {
            Byte(0x0f);
            Byte(size == 1 ? 0xb6 : 0xb7);
        }
        ModMemory(to, @base, displacement);
    }

    /// <summary>Loads with an index whose scale is a log2; 1 and 2 bytes are zero-extended.</summary>
    public void LoadIndexed(int to, int @base, int index, int scale, int displacement, int size = 8)
    {
        Changes(to);
        Rex(size, to, index, @base);
        if (size >= 4)
        {
            Byte(0x8b);
        }
        else
        {
            Byte(0x0f);
            Byte(size == 1 ? 0xb6 : 0xb7);
        }
        ModMemory(to, @base, index, scale, displacement);
    }

    /// <summary>Stores 4 or 8 bytes with an index.</summary>
    public void StoreIndexed(int @base, int index, int scale, int displacement, int from, int size = 8)
    {
        Rex(size, from, index, @base);
        Byte(0x89);
        ModMemory(from, @base, index, scale, displacement);
    }

    public void Store(int @base, int displacement, int from, int size = 8)
    {
        StoresTo(@base, displacement, size);
        if (from == Layout.T1 && @base == Layout.State && size == 8)
            _mirrored = displacement;
        Prefix16(size);
        Rex(size, from, 0, @base, size == 1 ? from : -1);
        Byte(size == 1 ? 0x88 : 0x89);
        ModMemory(from, @base, displacement);
    }

    /// <summary>Stores an immediate: sign-extended from 32 bits for 8 bytes.</summary>
    public void StoreImmediate(int @base, int displacement, int value, int size)
    {
        StoresTo(@base, displacement, size);
        Prefix16(size);
        Rex(size, 0, 0, @base);
        Byte(size == 1 ? 0xc6 : 0xc7);
        ModMemory(0, @base, displacement);
        if (size == 1)
        {
            Byte(value);
        }
        else if (size == 2)
        {
            Byte(value);
            Byte(value >> 8);
        }
        else
        {
            Dword(value);
        }
    }

    /// <summary>Zero-extends the low 1, 2 or 4 bytes.</summary>
    public void ZeroExtend(int to, int from, int size)
    {
        Changes(to);
        if (size == 4)
        {
            Move(to, from, 4);
            return;
        }
        Rex(4, to, 0, from, size == 1 ? from : -1);
        Byte(0x0f);
        Byte(size == 1 ? 0xb6 : 0xb7);
        ModRegister(to, from);
    }

    public void Lea(int to, int @base, int displacement, int size = 8)
    {
        Changes(to);
        Rex(size, to, 0, @base);
        Byte(0x8d);
        ModMemory(to, @base, displacement);
    }

    /// <summary>LEA with an index; <paramref name="base"/> may be -1 for none, <paramref name="scale"/> is a log2.</summary>
    public void Lea(int to, int @base, int index, int scale, int displacement, int size = 8)
    {
        Changes(to);
        Rex(size, to, index, Math.Max(@base, 0));
        Byte(0x8d);
        ModMemory(to, @base, index, scale, displacement);
    }

    // Arithmetic

    public void Arithmetic(Alu op, int to, int from, int size = 8)
    {
        Changes(op == Alu.Cmp ? -1 : to);
        Prefix16(size);
        int low = size == 1 ? (from is >= 4 and <= 7 ? from : to) : -1;
        Rex(size, from, 0, to, low);
        Byte((int)op << 3 | (size == 1 ? 0 : 1));
        ModRegister(from, to);
    }

    public void ArithmeticLoad(Alu op, int to, int @base, int displacement, int size = 8)
    {
        if (IsMirrored(@base, displacement))
        {
            Arithmetic(op, to, Layout.T1, size);
            return;
        }
        Changes(op == Alu.Cmp ? -1 : to);
        Prefix16(size);
        Rex(size, to, 0, @base, size == 1 ? to : -1);
        Byte((int)op << 3 | (size == 1 ? 2 : 3));
        ModMemory(to, @base, displacement);
    }

    public void ArithmeticStore(Alu op, int @base, int displacement, int from, int size = 8)
    {
        if (op != Alu.Cmp)
            StoresTo(@base, displacement, size);
        Prefix16(size);
        Rex(size, from, 0, @base, size == 1 ? from : -1);
        Byte((int)op << 3 | (size == 1 ? 0 : 1));
        ModMemory(from, @base, displacement);
    }

    public void ArithmeticImmediate(Alu op, int to, int value, int size = 8)
    {
        Changes(op == Alu.Cmp ? -1 : to);
        Prefix16(size);
        Rex(size, 0, 0, to, size == 1 ? to : -1);
        bool small = size > 1 && value is >= -128 and <= 127;
        Byte(size == 1 ? 0x80 : small ? 0x83 : 0x81);
        ModRegister((int)op, to);
        Immediate(value, size, small);
    }

    public void ArithmeticImmediateMemory(Alu op, int @base, int displacement, int value, int size)
    {
        if (op != Alu.Cmp)
            StoresTo(@base, displacement, size);
        Prefix16(size);
        Rex(size, 0, 0, @base);
        bool small = size > 1 && value is >= -128 and <= 127;
        Byte(size == 1 ? 0x80 : small ? 0x83 : 0x81);
        ModMemory((int)op, @base, displacement);
        Immediate(value, size, small);
    }

    public void Test(int a, int b, int size = 8)
    {
        Prefix16(size);
        int low = size == 1 ? (a is >= 4 and <= 7 ? a : b) : -1;
        Rex(size, b, 0, a, low);
        Byte(size == 1 ? 0x84 : 0x85);
        ModRegister(b, a);
    }

    public void TestImmediateByte(int register, int value)
    {
        Rex(1, 0, 0, register, register);
        Byte(0xf6);
        ModRegister(0, register);
        Byte(value);
    }

    public void TestImmediateByteMemory(int @base, int displacement, int value)
    {
        Rex(1, 0, 0, @base);
        Byte(0xf6);
        ModMemory(0, @base, displacement);
        Byte(value);
    }

    public void TestImmediate(int register, int value, int size)
    {
        Prefix16(size);
        Rex(size, 0, 0, register, size == 1 ? register : -1);
        Byte(size == 1 ? 0xf6 : 0xf7);
        ModRegister(0, register);
        Immediate(value, size, small: false);
    }

    public void TestMemory(int @base, int displacement, int register, int size)
    {
        Prefix16(size);
        Rex(size, register, 0, @base, size == 1 ? register : -1);
        Byte(size == 1 ? 0x84 : 0x85);
        ModMemory(register, @base, displacement);
    }

    public void TestImmediateMemory(int @base, int displacement, int value, int size)
    {
        Prefix16(size);
        Rex(size, 0, 0, @base);
        Byte(size == 1 ? 0xf6 : 0xf7);
        ModMemory(0, @base, displacement);
        Immediate(value, size, small: false);
    }

    /// <summary>NOT (2), NEG (3), DIV (6), IDIV (7) of group 3; INC (0) and DEC (1) of group 4/5.</summary>
    public void Unary(int group, int number, int register, int size)
    {
        Changes(register);
        Prefix16(size);
        Rex(size, 0, 0, register, size == 1 ? register : -1);
        Byte((group == 3 ? 0xf6 : 0xfe) | (size == 1 ? 0 : 1));
        ModRegister(number, register);
    }

    /// <summary>Shift group: SHL 4, SHR 5, SAR 7, by an immediate.</summary>
    public void Shift(int number, int register, int count, int size = 8)
    {
        Changes(register);
        Prefix16(size);
        Rex(size, 0, 0, register, size == 1 ? register : -1);
        Byte(size == 1 ? 0xc0 : 0xc1);
        ModRegister(number, register);
        Byte(count);
    }

    /// <summary>RORX (BMI2): rotates right without touching flags.</summary>
    public void RotateRight(int to, int from, int count)
    {
        Changes(to);
        Byte(0xc4);
        Byte((to >= 8 ? 0 : 0x80) | 0x40 | (from >= 8 ? 0 : 0x20) | 3);
        Byte(0x80 | 0x78 | 3);
        Byte(0xf0);
        ModRegister(to, from);
        Byte(count);
    }

    /// <summary>SETcc to a register's low byte.</summary>
    public void SetRegister(int condition, int register)
    {
        Changes(register);
        Rex(1, 0, 0, register, register);
        Byte(0x0f);
        Byte(0x90 | condition);
        ModRegister(0, register);
    }

    /// <summary>SETcc to a byte in memory.</summary>
    public void SetMemory(int condition, int @base, int displacement)
    {
        StoresTo(@base, displacement, 1);
        Rex(1, 0, 0, @base);
        Byte(0x0f);
        Byte(0x90 | condition);
        ModMemory(0, @base, displacement);
    }

    /// <summary>BT of a dword in memory with an immediate: CF takes the bit.</summary>
    public void BitTestMemory(int @base, int displacement, int bit)
    {
        Rex(4, 0, 0, @base);
        Byte(0x0f);
        Byte(0xba);
        ModMemory(4, @base, displacement);
        Byte(bit);
    }

    /// <summary>BT of a 32-bit register.</summary>
    public void BitTest(int register, int bit)
    {
        Rex(4, bit, 0, register);
        Byte(0x0f);
        Byte(0xa3);
        ModRegister(bit, register);
    }

    /// <summary>BT (4), BTS (5), BTR (6), BTC (7) of memory by a register.</summary>
    public void BitTestString(int number, int @base, int bit, int size)
    {
        Rex(size, bit, 0, @base);
        Byte(0x0f);
        Byte(0x83 | number << 3);
        ModMemory(bit, @base, 0);
    }

    /// <summary>MOVSXD from 32 bits to 64.</summary>
    public void SignExtend(int to, int from)
    {
        Changes(to);
        Rex(8, to, 0, from);
        Byte(0x63);
        ModRegister(to, from);
    }

    /// <summary>MULX of RDX by a register, or where that is -1 by memory.</summary>
    public void MultiplyNoFlags(int high, int low, int source, int @base, int displacement, int size)
    {
        Changes(high);
        Changes(low);
        int rm = source >= 0 ? source : @base;
        Byte(0xc4);
        Byte((high >= 8 ? 0 : 0x80) | 0x40 | (rm >= 8 ? 0 : 0x20) | 2);
        Byte((size == 8 ? 0x80 : 0) | (~low & 15) << 3 | 3);
        Byte(0xf6);
        if (source >= 0)
            ModRegister(high, source);
        else
            ModMemory(high, @base, displacement);
    }

    public void PushFlags() => Byte(0x9c);

    /// <returns>The position of the 8-bit field.</returns>
    public int JumpIfCounterZero()
    {
        Byte(0xe3);
        Byte(0);
        return _length - 1;
    }

    /// <summary>IMUL by a quadword in memory.</summary>
    public void MultiplyLoad(int to, int @base, int displacement)
    {
        Changes(to);
        Rex(8, to, 0, @base);
        Byte(0x0f);
        Byte(0xaf);
        ModMemory(to, @base, displacement);
    }

    public void IncrementMemory(int @base, int displacement, int size)
    {
        StoresTo(@base, displacement, size);
        Rex(size, 0, 0, @base);
        Byte(0xff);
        ModMemory(0, @base, displacement);
    }

    public void ClearCarry() => Byte(0xf8);

    public void SetCarry() => Byte(0xf9);

    // Flow. Relative operands are given as addresses, or fixed later by the position of their field.

    public void Push(int register)
    {
        Rex(4, 0, 0, register);
        Byte(0x50 | (register & 7));
    }

    public void Pop(int register)
    {
        Changes(register);
        Rex(4, 0, 0, register);
        Byte(0x58 | (register & 7));
    }

    public void Return() => Byte(0xc3);

    public void PopMemory(int @base, int displacement)
    {
        StoresTo(@base, displacement, 8);
        Rex(4, 0, 0, @base);
        Byte(0x8f);
        ModMemory(0, @base, displacement);
    }

    public void CallMemory(int @base, int displacement)
    {
        _mirrored = Nothing;
        Rex(4, 0, 0, @base);
        Byte(0xff);
        ModMemory(2, @base, displacement);
    }

    public void CallRegister(int register)
    {
        _mirrored = Nothing;
        Rex(4, 0, 0, register);
        Byte(0xff);
        ModRegister(2, register);
    }

    public void JumpRegister(int register)
    {
        Rex(4, 0, 0, register);
        Byte(0xff);
        ModRegister(4, register);
    }

    public void JumpMemory(int @base, int displacement)
    {
        Rex(4, 0, 0, @base);
        Byte(0xff);
        ModMemory(4, @base, displacement);
    }

    /// <returns>The position of the 32-bit field.</returns>
    public int Jump()
    {
        Byte(0xe9);
        Dword(0);
        return _length - 4;
    }

    /// <returns>The position of the 32-bit field.</returns>
    public int JumpIf(int condition)
    {
        Byte(0x0f);
        Byte(0x80 | condition);
        Dword(0);
        return _length - 4;
    }

    /// <summary>A conditional jump back to a position that is near.</summary>
    public void JumpIfShort(int condition, int position)
    {
        Byte(0x70 | condition);
        int distance = position - (_length + 1);
        if (distance is < sbyte.MinValue or > 0)
            throw new InvalidOperationException("a short jump goes too far");
        Byte(distance);
    }

    /// <returns>The position of the 8-bit field.</returns>
    public int JumpIfShort(int condition)
    {
        Byte(0x70 | condition);
        Byte(0);
        return _length - 1;
    }

    /// <summary>Bytes that can be changed in one write while they may be executing, aligned.</summary>
    public const int PatchUnit = 8;

    /// <summary>How many bytes are missing until something at a distance from here lies in one unit.</summary>
    private int MissingToUnit(int distance, int length)
    {
        int place = (int)((Origin + (ulong)(_length + distance)) & (PatchUnit - 1));
        return place + length > PatchUnit ? PatchUnit - place : 0;
    }

    /// <summary>A call that can be replaced by a jump while it may be executing: it lies in one unit.</summary>
    /// <returns>The position of the 32-bit field.</returns>
    public int CallReplaceable(ulong address)
    {
        Pad(MissingToUnit(0, 5));
        CallTo(address);
        return _length - 4;
    }

    /// <summary>A jump whose field can be changed while it may be executing: it lies in one unit.</summary>
    /// <returns>The position of the field.</returns>
    public int JumpPatchable(ulong address)
    {
        Pad(MissingToUnit(1, sizeof(int)));
        JumpTo(address);
        return _length - 4;
    }

    /// <summary>A call whose field can be changed while it may be executing.</summary>
    public int CallPatchable()
    {
        _mirrored = Nothing;
        Pad(MissingToUnit(1, sizeof(int)));
        Byte(0xe8);
        Dword(0);
        return _length - 4;
    }

    /// <summary>A conditional jump whose field can be changed while it may be executing.</summary>
    public int JumpIfPatchable(int condition)
    {
        // The field follows two bytes of opcode; ignored segment prefixes fill up.
        int missing = MissingToUnit(2, sizeof(int));
        for (int i = 0; i < missing; i++)
            Byte(0x2e);
        return JumpIf(condition);
    }

    public void JumpTo(ulong address) => FixTo(Jump(), address);

    public void JumpIfTo(int condition, ulong address) => FixTo(JumpIf(condition), address);

    public void CallTo(ulong address)
    {
        _mirrored = Nothing;
        Byte(0xe8);
        Dword(0);
        FixTo(_length - 4, address);
    }

    /// <summary>Makes a 32-bit field lead to the current position.</summary>
    public void Fix(int field)
    {
        _mirrored = Nothing;
        Put(field, _length - field - 4);
    }

    /// <summary>Makes a 32-bit field lead to a position.</summary>
    public void Fix(int field, int position) => Put(field, position - field - 4);

    public void FixShort(int field)
    {
        _mirrored = Nothing;
        int distance = _length - field - 1;
        if (distance > 127)
            throw new InvalidOperationException("a short jump goes too far");
        _code[field] = (byte)distance;
    }

    public void FixTo(int field, ulong address) => Put(field, (int)((long)address - (long)(Origin + (ulong)field + 4)));

    private void Put(int field, int value) => BinaryPrimitives.WriteInt32LittleEndian(_code.AsSpan(field), value);

    /// <summary>Replaces a 64-bit immediate.</summary>
    public void PutQword(int position, ulong value) => BinaryPrimitives.WriteUInt64LittleEndian(_code.AsSpan(position), value);

    private void Immediate(int value, int size, bool small)
    {
        if (size == 1 || small)
        {
            Byte(value);
        }
        else if (size == 2)
        {
            Byte(value);
            Byte(value >> 8);
        }
        else
        {
            Dword(value);
        }
    }
}
