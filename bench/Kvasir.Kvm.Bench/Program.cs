using System;
using System.Diagnostics;
using System.Globalization;
using Kvasir.Core;
using Kvasir.Kvm;

// Prints nanoseconds per port-I/O exit through a device in C#, and microseconds per VM from its making to its end, or what
// the choice of --accel auto looks at. Usage: Kvasir.Kvm.Bench exits|life|probe COUNT
int count = args.Length > 1 ? int.Parse(args[1], CultureInfo.InvariantCulture) : 20_000;
if (args is ["probe", ..])
{
    long started = Stopwatch.GetTimestamp();
    KvmProbe probe = KvmProbe.Run();
    Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{Stopwatch.GetElapsedTime(started).TotalMilliseconds:f0} ms: {probe.Problem ?? probe.SpeedText + " instructions/s in ring 0"}"));
    return;
}
if (args is ["life", ..])
{
    new Exits(10).Run();
    long begun = Stopwatch.GetTimestamp();
    for (int i = 0; i < count; i++)
        new Exits(1).Run();
    Console.WriteLine(((long)(Stopwatch.GetElapsedTime(begun).TotalMicroseconds / count)).ToString(CultureInfo.InvariantCulture));
    return;
}
new Exits(2000).Run();
Console.WriteLine(((long)new Exits(count).Run()).ToString(CultureInfo.InvariantCulture));

/// <summary>A real-mode guest that writes to a port in a loop, and the device behind the port.</summary>
internal sealed class Exits(int count) : IPortDevice
{
    private readonly int _warm = count / 10;
    private KvmVcpu? _vcpu;
    private int _seen;
    private long _begun;
    private long _ended;
    private uint _last;

    /// <returns>Nanoseconds per exit.</returns>
    public double Run()
    {
        using KvmSystem system = new();
        using SpeedLoop parts = new();
        using KvmVm vm = new(system, parts.Memory);
        using KvmVcpu vcpu = vm.CreateVcpu(0, new KvmVcpuWiring
        {
            Ports = parts.Ports, Mmio = parts.Mmio, Apic = parts.Apic, Clock = parts.Clock, Cpuid = system.SupportedCpuid, Signature = 0,
        });
        // out 81h, al; jmp -4
        parts.Memory.TryWrite(new Gpa(0x1000), (ReadOnlySpan<byte>)[0xe6, 0x81, 0xeb, 0xfc]);
        parts.Ports.Map(0x81, 1, this);
        CpuState state = CpuState.AtReset();
        state.Cs = state.Cs with { Selector = 0, Base = 0 };
        state.Rip = 0x1000;
        vcpu.SetState(in state);
        _vcpu = vcpu;
        if (vcpu.Run() != VcpuExit.Kicked)
            throw new InvalidOperationException(vcpu.FailureReport);
        return Stopwatch.GetElapsedTime(_begun, _ended).TotalNanoseconds / count;
    }

    public uint ReadPort(ushort port, AccessSize size) => _last;

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        _last = value;
        _seen++;
        if (_seen == _warm + 1)
            _begun = Stopwatch.GetTimestamp();
        if (_seen != _warm + 1 + count)
            return;
        _ended = Stopwatch.GetTimestamp();
        _vcpu!.Kick();
    }
}
