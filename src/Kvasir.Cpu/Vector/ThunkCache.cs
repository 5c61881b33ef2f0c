using System;
using System.Collections.Generic;
using System.Threading;
using Iced.Intel;
using Kvasir.Linux;

namespace Kvasir.Cpu;

/// <summary>
/// Every thunk of the process, known by its instruction's canonical bytes. Registers are not part of them, so that there is an end to how many
/// there can be (opcodes times immediate bytes); they are never freed. Any thread.
/// </summary>
internal static unsafe class ThunkCache
{
    /// <summary>Room for every opcode with every immediate byte; pages are allocated as thunks are made.</summary>
    private const ulong Capacity = 64ul << 20;
    private const int Alignment = 16;

    private static readonly Lock Gate = new();
    private static readonly Dictionary<Key, nint> Thunks = [];
    private static readonly ThunkCompiler Compiler = new();
    private static readonly ExecutableMemory Memory = new("kvasir-thunks", Capacity);
    private static ulong _used;

    private readonly record struct Key(ulong Low, ulong High);

    /// <summary>Bytes of code made so far.</summary>
    public static ulong BytesUsed => Volatile.Read(ref _used);

    /// <summary>Makes sure that there is memory for code: the type's first use asks the kernel for it.</summary>
    /// <exception cref="TypeInitializationException">The kernel refused (the inner exception says why).</exception>
    public static void Prepare()
    {
        lock (Gate)
            _ = Memory.Executable;
    }

    /// <summary>The thunk for an instruction on canonical operands.</summary>
    /// <returns>False: the instruction has no 64-bit form, or there is no room left.</returns>
    public static bool TryGet(in Instruction instruction, out nint thunk)
    {
        thunk = 0;
        lock (Gate)
        {
            ReadOnlySpan<byte> bytes = Compiler.Encode(in instruction);
            if (bytes.IsEmpty)
                return false;
            bool x87 = bytes[0] is >= 0xd8 and <= 0xdf;
            Key key = KeyOf(bytes);
            if (Thunks.TryGetValue(key, out thunk))
                return true;
            byte[] code = x87 ? Compiler.CompileX87(in instruction) : Compiler.Compile(in instruction);
            return TryAdd(code, out thunk) && Thunks.TryAdd(key, thunk);
        }
    }

    /// <summary>The 11-bit opcode of an x87 instruction: the low bits of its first byte and its ModRM byte, as the guest has them.</summary>
    public static ushort X87Opcode(in Instruction instruction)
    {
        lock (Gate)
        {
            ReadOnlySpan<byte> bytes = Compiler.EncodeOriginal(in instruction);
            for (int i = 0; i + 1 < bytes.Length; i++)
            {
                // Prefixes come before; none of them lies among D8h-DFh.
                if (bytes[i] is >= 0xd8 and <= 0xdf)
                    return (ushort)((bytes[i] & 7) << 8 | bytes[i + 1]);
            }
            return 0;
        }
    }

    /// <summary>Makes one of the functions that are no instruction's.</summary>
    /// <exception cref="InvalidOperationException">There is no room left.</exception>
    public static nint Make(Func<ThunkCompiler, byte[]> compile)
    {
        lock (Gate)
            return TryAdd(compile(Compiler), out nint thunk) ? thunk : throw new InvalidOperationException("the space for thunks is used up");
    }

    private static bool TryAdd(byte[] code, out nint thunk)
    {
        thunk = 0;
        if (_used + (ulong)code.Length > Capacity)
            return false;
        Memory.Write(_used, code);
        thunk = (nint)(Memory.Executable + _used);
        Volatile.Write(ref _used, (_used + (ulong)code.Length + Alignment - 1) & ~(ulong)(Alignment - 1));
        return true;
    }

    /// <summary>An instruction has at most 15 bytes; the sixteenth holds their number.</summary>
    private static Key KeyOf(ReadOnlySpan<byte> bytes)
    {
        Span<byte> padded = stackalloc byte[16];
        padded.Clear();
        bytes.CopyTo(padded);
        padded[15] = (byte)bytes.Length;
        return new Key(System.Buffers.Binary.BinaryPrimitives.ReadUInt64LittleEndian(padded), System.Buffers.Binary.BinaryPrimitives.ReadUInt64LittleEndian(padded[8..]));
    }
}
