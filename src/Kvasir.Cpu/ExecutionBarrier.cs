using System.Collections.Generic;
using System.Threading;

namespace Kvasir.Cpu;

/// <summary>
/// Knows which vCPUs execute guest code, and lets one party act while none does: dropping write translations of a page that became code,
/// emptying the code cache, a locked operand across pages. vCPUs notice at their next block boundary.
/// </summary>
public sealed class ExecutionBarrier
{
    private readonly object _lock = new();
    private readonly List<SoftVcpu> _vcpus = [];
    private int _inside;
    private int _waiting;
    private int _midInstruction;
    private bool _exclusive;

    public int Count => _vcpus.Count;

    /// <summary>Every vCPU that takes part, in order of index.</summary>
    public IReadOnlyList<SoftVcpu> Vcpus => _vcpus;

    internal void Add(SoftVcpu vcpu)
    {
        lock (_lock)
            _vcpus.Add(vcpu);
    }

    internal void Remove(SoftVcpu vcpu)
    {
        lock (_lock)
            _vcpus.Remove(vcpu);
    }

    /// <summary>Before guest code runs; waits while somebody acts exclusively or wants to.</summary>
    public void Enter()
    {
        lock (_lock)
        {
            while (_exclusive || _waiting > 0)
                Monitor.Wait(_lock);
            _inside++;
        }
    }

    /// <summary>After guest code ran, and before a vCPU sleeps.</summary>
    public void Leave()
    {
        lock (_lock)
        {
            _inside--;
            Monitor.PulseAll(_lock);
        }
    }

    /// <summary>
    /// Waits until no vCPU executes guest code, and keeps it so until <see cref="EndExclusive"/>. A vCPU that calls this in the middle of an
    /// instruction says which it is: it counts as outside meanwhile, but its blocks are not taken away.
    /// </summary>
    public void BeginExclusive(SoftVcpu? caller)
    {
        lock (_lock)
        {
            if (caller is not null)
            {
                _inside--;
                _midInstruction++;
            }
            Acquire(caller, () => _inside > 0);
            if (caller is not null)
                _midInstruction--;
        }
    }

    /// <summary>As <see cref="BeginExclusive"/> from outside guest code, and no vCPU stands in the middle of an instruction either.</summary>
    public void BeginExclusiveBetweenInstructions()
    {
        lock (_lock)
            Acquire(null, () => _inside > 0 || _midInstruction > 0);
    }

    /// <summary>Lets the others go on.</summary>
    /// <param name="caller">The vCPU that goes on executing, as given to <see cref="BeginExclusive"/>.</param>
    public void EndExclusive(SoftVcpu? caller)
    {
        lock (_lock)
        {
            _exclusive = false;
            if (caller is not null)
                _inside++;
            Monitor.PulseAll(_lock);
        }
    }

    private void Acquire(SoftVcpu? caller, System.Func<bool> occupied)
    {
        _waiting++;
        foreach (SoftVcpu vcpu in _vcpus)
        {
            if (vcpu != caller)
                vcpu.Post(PendingWork.Exclusive);
        }
        Monitor.PulseAll(_lock);
        while (_exclusive || occupied())
            Monitor.Wait(_lock);
        _waiting--;
        _exclusive = true;
    }
}
