using System.Collections.Generic;
using System.Globalization;
using System.Text;
using Iced.Intel;
using Kvasir.Core;
using Decoder = Iced.Intel.Decoder;

namespace Kvasir.Cpu;

/// <summary>Reports for a person: what the vCPU was doing when it could not go on.</summary>
public static unsafe class FailureReports
{
    private const int CodeBytes = 32;
    private const int LastInstructions = 8;

    public static string TripleFault(SoftVcpu vcpu) => Describe(vcpu, "triple fault");

    /// <summary>Registers, segments, tables, the way here, the last instructions and those at RIP.</summary>
    /// <param name="vcpu">A vCPU that does not run.</param>
    /// <param name="reason">What happened, in a few words.</param>
    public static string Describe(SoftVcpu vcpu, string reason)
    {
        vcpu.GetState(out CpuState s);
        StringBuilder text = new();
        Line(text, $"vCPU {vcpu.Index}: {reason} after {vcpu.InstructionsRetired} instructions");
        string[] names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
        for (int i = 0; i < 16; i += 4)
            Line(text, $"{names[i],3} {s.Gpr[i]:x16}  {names[i + 1],3} {s.Gpr[i + 1]:x16}  {names[i + 2],3} {s.Gpr[i + 2]:x16}  {names[i + 3],3} {s.Gpr[i + 3]:x16}");
        Line(text, $"rip {s.Rip:x16}  rflags {s.Rflags:x8}  cpl {vcpu.Block->Cpl}  activity {s.Activity}");
        Segment(text, "cs", s.Cs);
        Segment(text, "ss", s.Ss);
        Segment(text, "ds", s.Ds);
        Segment(text, "es", s.Es);
        Segment(text, "fs", s.Fs);
        Segment(text, "gs", s.Gs);
        Segment(text, "ldt", s.Ldtr);
        Segment(text, "tr", s.Tr);
        Line(text, $"gdt {s.Gdtr.Base:x16}+{s.Gdtr.Limit:x4}  idt {s.Idtr.Base:x16}+{s.Idtr.Limit:x4}");
        Line(text, $"cr0 {s.Cr0:x8}  cr2 {s.Cr2:x16}  cr3 {s.Cr3:x16}  cr4 {s.Cr4:x8}  efer {s.Efer:x}  xcr0 {s.Xcr0:x}");
        Trail(text, vcpu);
        Executed(text, vcpu, in s);
        Code(text, vcpu, in s);
        return text.ToString();
    }

    private static void Segment(StringBuilder text, string name, SegmentState segment) =>
        Line(text, $"{name,3} {segment.Selector:x4}  base {segment.Base:x16}  limit {segment.Limit:x8}  attributes {segment.Attributes:x5}");

    /// <summary>Where the execution loop was entered and what it delivered, oldest first.</summary>
    private static void Trail(StringBuilder text, SoftVcpu vcpu)
    {
        foreach ((ulong rip, byte vector) in vcpu.Trail())
            Line(text, vector == Fault.None ? $"  ran from {rip:x16}" : (System.FormattableString)$"  raised {(X86.ExceptionVector)vector} (vector {vector}) at {rip:x16}");
    }

    /// <summary>The last instructions before RIP: those of the block that ran last, where RIP lies in it.</summary>
    private static void Executed(StringBuilder text, SoftVcpu vcpu, in CpuState s)
    {
        ulong start = vcpu.Block->BlockRip;
        if (s.Rip <= start || s.Rip - start >= GuestMemory.PageSize)
            return;
        byte[] bytes = new byte[s.Rip - start];
        int count = Read(vcpu, start, in s, bytes);
        Decoder decoder = NewDecoder(vcpu, bytes, count, start);
        List<string> lines = [];
        while (decoder.IP - start < (ulong)count)
        {
            decoder.Decode(out Instruction instruction);
            if (instruction.IsInvalid)
                break;
            lines.Add(Text(in instruction));
        }
        Line(text, $"last instructions:");
        for (int i = System.Math.Max(0, lines.Count - LastInstructions); i < lines.Count; i++)
            text.AppendLine(lines[i]);
    }

    private static void Code(StringBuilder text, SoftVcpu vcpu, in CpuState s)
    {
        byte[] bytes = new byte[CodeBytes];
        int count = Read(vcpu, s.Rip, in s, bytes);
        if (count == 0)
        {
            Line(text, $"no memory is mapped at rip");
            return;
        }
        Line(text, $"at rip: {System.Convert.ToHexStringLower(bytes, 0, count)}");
        Decoder decoder = NewDecoder(vcpu, bytes, count, s.Rip);
        for (int i = 0; i < 4 && decoder.IP - s.Rip < (ulong)count; i++)
        {
            decoder.Decode(out Instruction instruction);
            if (instruction.IsInvalid)
                break;
            text.AppendLine(Text(in instruction));
        }
    }

    private static string Text(in Instruction instruction)
    {
        IntelFormatter formatter = new();
        StringOutput output = new();
        formatter.Format(in instruction, output);
        return string.Create(CultureInfo.InvariantCulture, $"  {instruction.IP:x16}  {output.ToStringAndReset()}");
    }

    private static Decoder NewDecoder(SoftVcpu vcpu, byte[] bytes, int count, ulong rip)
    {
        int bitness = (vcpu.Block->Mode & CodeMode.SizeMask) switch
        {
            CodeMode.Code64 => 64,
            CodeMode.Code32 => 32,
            _ => 16,
        };
        Decoder decoder = Decoder.Create(bitness, new ByteArrayCodeReader(bytes, 0, count));
        decoder.IP = rip;
        return decoder;
    }

    /// <summary>Reads code as far as it is mapped, and leaves no fault behind.</summary>
    private static int Read(SoftVcpu vcpu, ulong rip, in CpuState s, byte[] bytes)
    {
        VcpuBlock* block = vcpu.Block;
        ulong linear = (block->Mode & CodeMode.SizeMask) == CodeMode.Code64 ? rip : (uint)(s.Cs.Base + rip);
        byte fault = block->FaultVector;
        int count = 0;
        while (count < bytes.Length && vcpu.Mmu.TryTranslate(AccessRights.SupervisorAc, linear + (ulong)count, AccessKind.Read, out Translation translation)
            && vcpu.Memory.TryRead(new Gpa(translation.Physical), out bytes[count]))
        {
            count++;
        }
        block->FaultVector = fault;
        return count;
    }

    private static void Line(StringBuilder text, System.FormattableString line) => text.AppendLine(line.ToString(CultureInfo.InvariantCulture));
}
