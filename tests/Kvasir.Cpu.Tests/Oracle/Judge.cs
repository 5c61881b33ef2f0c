using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;
using Iced.Intel;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>Compares two outcomes of a case: everything the manual defines must be the same.</summary>
internal static unsafe class Judge
{
    private const uint PageFault = 14;
    private const uint Breakpoint = 3;

    /// <summary>The code set the trap flag: that is a debugger's matter.</summary>
    private const uint DebugTrap = 1;
    private const uint FetchBit = 16;
    private const uint SimdException = 19;

    /// <summary>CF PF AF ZF SF DF OF NT AC ID: what a user program can change.</summary>
    private const ulong ComparedFlags = 0x24_4cd5;
    private static readonly string[] RegisterNames =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    private static readonly string[] SegmentNames = ["es", "cs", "ss", "ds", "fs", "gs"];

    /// <summary>
    /// The helper's INT3 and the fetch fault after a branch that was taken are not the instruction's own: it went where RIP says.
    /// </summary>
    /// <param name="r">The outcome.</param>
    /// <param name="start">RIP before.</param>
    public static void Normalize(OracleRecord* r, ulong start)
    {
        if (r->Vector == Breakpoint)
        {
            r->Vector = OracleRecord.NoVector;
            r->Out.Rip--;
        }
        else if (r->Vector == PageFault && (r->Error & FetchBit) != 0 && r->Out.Rip != start)
        {
            r->Vector = OracleRecord.NoVector;
        }
        if (r->Vector == OracleRecord.NoVector)
            r->Error = 0;
        if (r->Vector != PageFault)
            r->Cr2 = 0;
    }

    /// <summary>Whether the case can be judged at all: what touched memory outside the window met the helper's own there.</summary>
    public static bool IsFair(OracleRecord* host, OracleRecord* soft)
    {
        if (host->Vector is OracleRecord.TimedOut or DebugTrap || soft->Vector == OracleRecord.ShutDown)
            return false;
        return soft->Vector != PageFault || host->Vector == PageFault || soft->Cr2 + 0x10000 - Window.Start < 0x20000 + Window.Size;
    }

    /// <summary>Everything that differs; empty where the processors agree.</summary>
    /// <param name="host">What the host did, its input included.</param>
    /// <param name="soft">What the software CPU did.</param>
    /// <param name="latitude">What the manual leaves open.</param>
    public static List<string> Compare(OracleRecord* host, OracleRecord* soft, Latitude latitude)
    {
        List<string> differences = [];
        if (latitude.Result)
            return differences;
        bool faulted = host->Vector != OracleRecord.NoVector && soft->Vector != OracleRecord.NoVector;
        bool wide = host->Mode == 64;
        ulong mask = wide ? ulong.MaxValue : uint.MaxValue;
        if (faulted && latitude.FaultOrder && IsOperandFault(host->Vector) && IsOperandFault(soft->Vector))
        {
            if (latitude.RegistersAfterFault)
                return differences;
        }
        else if (latitude.FaultOptional && IsOperandFault(host->Vector) && soft->Vector == OracleRecord.NoVector)
        {
            return differences;
        }
        else if (host->Vector != soft->Vector)
            differences.Add($"vector: host {Vector(host)}, soft {Vector(soft)}");
        else if (host->Vector != OracleRecord.NoVector)
            CompareFault(host, soft, latitude, differences);
        UserState* a = &host->Out;
        UserState* b = &soft->Out;
        for (int i = 0; i < (wide ? 16 : 8) && !(faulted && latitude.RegistersAfterFault); i++)
            Check(differences, RegisterNames[i], host->In.Gpr[i] & mask, a->Gpr[i] & mask, b->Gpr[i] & mask);
        Check(differences, "rip", host->In.Rip & mask, a->Rip & mask, b->Rip & mask);
        ulong flags = ComparedFlags & ~latitude.Flags;
        Check(differences, "flags", host->In.Flags & flags, a->Flags & flags, b->Flags & flags);
        for (int i = 0; i < 6; i++)
            Check(differences, SegmentNames[i], Selector(host->In.Selectors[i]), Selector(a->Selectors[i]), Selector(b->Selectors[i]));
        if (wide)
        {
            Check(differences, "fs base", host->In.FsBase, a->FsBase, b->FsBase);
            Check(differences, "gs base", host->In.GsBase, a->GsBase, b->GsBase);
        }
        if (!(faulted && latitude.VectorsAfterFault))
            CompareVectors(host, soft, latitude, differences);
        CompareX87(host, soft, differences);
        if (host->Hash != soft->Hash)
            differences.Add("memory");
        return differences;
    }

    /// <summary>The host's kernel clears the RPL of null selectors when it switches tasks.</summary>
    private static uint Selector(ushort selector) => selector <= 3 ? 0u : selector;

    /// <summary>#SS, #GP, #PF, #AC: what the address of an operand can raise.</summary>
    private static bool IsOperandFault(uint vector) => vector is 12 or 13 or 14 or 17;

    private static void CompareFault(OracleRecord* host, OracleRecord* soft, Latitude latitude, List<string> differences)
    {
        if (host->Vector != PageFault)
        {
            if (host->Error != soft->Error)
                differences.Add($"error code: host {host->Error:x}, soft {soft->Error:x}");
            return;
        }
        if (host->Cr2 != soft->Cr2 && !(latitude.FaultAddress && (host->Cr2 ^ soft->Cr2) < 4096))
            differences.Add($"cr2: host {host->Cr2:x}, soft {soft->Cr2:x}");
        // Outside the window the host's kernel decides what the present bit shows.
        uint bits = Window.Contains(host->Cr2) ? 0x1fu : 0x1eu;
        if (((host->Error ^ soft->Error) & bits) != 0)
            differences.Add($"error code: host {host->Error:x}, soft {soft->Error:x}");
    }

    private static void CompareVectors(OracleRecord* host, OracleRecord* soft, Latitude latitude, List<string> differences)
    {
        if (!new ReadOnlySpan<byte>(host->Out.Ymm, 512).SequenceEqual(new ReadOnlySpan<byte>(soft->Out.Ymm, 512)))
        {
            for (int i = 0; i < 16; i++)
            {
                ReadOnlySpan<byte> a = new(host->Out.Ymm + i * 32, 32);
                ReadOnlySpan<byte> b = new(soft->Out.Ymm + i * 32, 32);
                if (!a.SequenceEqual(b))
                    differences.Add($"ymm{i}: was {Hex(new(host->In.Ymm + i * 32, 32))}\n        host {Hex(a)}\n        soft {Hex(b)}");
            }
        }
        uint open = host->Vector == SimdException && soft->Vector == SimdException ? latitude.SimdFlags : 0;
        Check(differences, "mxcsr", host->In.Mxcsr, host->Out.Mxcsr & ~open, soft->Out.Mxcsr & ~open);
    }

    private static void CompareX87(OracleRecord* host, OracleRecord* soft, List<string> differences)
    {
        byte* a = host->Out.Fx;
        byte* b = soft->Out.Fx;
        if (new ReadOnlySpan<byte>(a, 160).SequenceEqual(new ReadOnlySpan<byte>(b, 160)))
            return;
        byte* was = host->In.Fx;
        Check(differences, "fcw", *(ushort*)(was + UserState.Fcw), *(ushort*)(a + UserState.Fcw), *(ushort*)(b + UserState.Fcw));
        Check(differences, "fsw", *(ushort*)(was + UserState.Fsw), *(ushort*)(a + UserState.Fsw), *(ushort*)(b + UserState.Fsw));
        Check(differences, "ftw", was[UserState.Ftw], a[UserState.Ftw], b[UserState.Ftw]);
        Check(differences, "fop", *(ushort*)(was + UserState.Fop), *(ushort*)(a + UserState.Fop), *(ushort*)(b + UserState.Fop));
        Check(differences, "fip", *(ulong*)(was + UserState.Fip), *(ulong*)(a + UserState.Fip), *(ulong*)(b + UserState.Fip));
        Check(differences, "fdp", *(ulong*)(was + UserState.Fdp), *(ulong*)(a + UserState.Fdp), *(ulong*)(b + UserState.Fdp));
        for (int i = 0; i < 8; i++)
        {
            int at = UserState.St0 + i * 16;
            ReadOnlySpan<byte> x = new(a + at, 10);
            ReadOnlySpan<byte> y = new(b + at, 10);
            if (!x.SequenceEqual(y))
                differences.Add($"st{i}: was {Hex(new(was + at, 10))}, host {Hex(x)}, soft {Hex(y)}");
        }
    }

    private static void Check(List<string> differences, string name, ulong was, ulong host, ulong soft)
    {
        if (host != soft)
            differences.Add($"{name}: was {was:x}, host {host:x}, soft {soft:x}");
    }

    private static string Vector(OracleRecord* r) => r->Vector switch
    {
        OracleRecord.NoVector => "none",
        OracleRecord.TimedOut => "none (it does not end)",
        PageFault => $"14 (error {r->Error:x}, address {r->Cr2:x})",
        _ => $"{r->Vector} (error {r->Error:x})",
    };

    /// <summary>The bytes as one number, most significant first.</summary>
    private static string Hex(ReadOnlySpan<byte> bytes)
    {
        StringBuilder text = new();
        for (int i = bytes.Length - 1; i >= 0; i--)
        {
            text.Append(bytes[i].ToString("x2", CultureInfo.InvariantCulture));
            if (i % 8 == 0 && i != 0)
                text.Append('_');
        }
        return text.ToString();
    }

    /// <summary>A case for a person: bytes, instruction, the registers that matter.</summary>
    public static string Describe(OracleRecord* r, Func<int, Instruction> decode)
    {
        StringBuilder text = new();
        NasmFormatter formatter = new();
        StringOutput output = new();
        int at = 0;
        while (at < r->CodeLength)
        {
            Instruction instruction = decode(at);
            int length = Math.Max(instruction.Length, 1);
            if (instruction.IsInvalid)
                length = (int)r->CodeLength - at;
            formatter.Format(in instruction, output);
            string bytes = Convert.ToHexString(new ReadOnlySpan<byte>(r->Code + at, Math.Min(length, (int)r->CodeLength - at)));
            text.Append(CultureInfo.InvariantCulture, $"    {r->In.Rip + (ulong)at:x8}  {bytes,-24} {(instruction.IsInvalid ? "(invalid)" : output.ToStringAndReset())}\n");
            at += length;
        }
        text.Append("    in:");
        for (int i = 0; i < (r->Mode == 64 ? 16 : 8); i++)
            text.Append(CultureInfo.InvariantCulture, $" {RegisterNames[i]}={r->In.Gpr[i]:x}");
        text.Append(CultureInfo.InvariantCulture, $" flags={r->In.Flags:x} mxcsr={r->In.Mxcsr:x} fcw={*(ushort*)r->In.Fx:x}");
        for (int i = 0; i < 6; i++)
            text.Append(CultureInfo.InvariantCulture, $" {SegmentNames[i]}={r->In.Selectors[i]:x}");
        if (r->Mode == 64)
            text.Append(CultureInfo.InvariantCulture, $" fsbase={r->In.FsBase:x} gsbase={r->In.GsBase:x}");
        if (r->PatchLength > 0)
        {
            string patch = Convert.ToHexString(new ReadOnlySpan<byte>(r->Patch, (int)Math.Min(r->PatchLength, 64)));
            text.Append(CultureInfo.InvariantCulture, $"\n    memory at {r->PatchLinear:x}: {patch}");
        }
        return text.Append('\n').ToString();
    }
}
