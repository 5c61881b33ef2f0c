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

    public static string TripleFault(SoftVcpu vcpu) => Describe(vcpu, "triple fault");

    /// <summary>Registers, segments, tables, and the instructions at RIP.</summary>
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
        Code(text, vcpu, in s);
        return text.ToString();
    }

    private static void Segment(StringBuilder text, string name, SegmentState segment) =>
        Line(text, $"{name,3} {segment.Selector:x4}  base {segment.Base:x16}  limit {segment.Limit:x8}  attributes {segment.Attributes:x5}");

    private static void Code(StringBuilder text, SoftVcpu vcpu, in CpuState s)
    {
        uint size = vcpu.Block->Mode & CodeMode.SizeMask;
        ulong linear = size == CodeMode.Code64 ? s.Rip : (uint)(s.Cs.Base + s.Rip);
        byte[] bytes = new byte[CodeBytes];
        int count = 0;
        VcpuBlock* block = vcpu.Block;
        byte fault = block->FaultVector;
        while (count < CodeBytes && vcpu.Mmu.TryTranslate(AccessRights.SupervisorAc, linear + (ulong)count, AccessKind.Read, out Translation translation)
            && vcpu.Memory.TryRead(new Gpa(translation.Physical), out bytes[count]))
        {
            count++;
        }
        // Looking must not leave a fault behind.
        block->FaultVector = fault;
        if (count == 0)
        {
            Line(text, $"no memory is mapped at rip");
            return;
        }
        Line(text, $"code {System.Convert.ToHexStringLower(bytes, 0, count)}");
        Decoder decoder = Decoder.Create(size == CodeMode.Code64 ? 64 : size == CodeMode.Code32 ? 32 : 16, new ByteArrayCodeReader(bytes, 0, count));
        decoder.IP = s.Rip;
        IntelFormatter formatter = new();
        StringOutput output = new();
        for (int i = 0; i < 4 && decoder.IP - s.Rip < (ulong)count; i++)
        {
            decoder.Decode(out Instruction instruction);
            if (instruction.IsInvalid)
                break;
            formatter.Format(in instruction, output);
            Line(text, $"  {instruction.IP:x16}  {output.ToStringAndReset()}");
        }
    }

    private static void Line(StringBuilder text, System.FormattableString line) => text.AppendLine(line.ToString(CultureInfo.InvariantCulture));
}
