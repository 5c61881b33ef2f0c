using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Core;

namespace Kvasir.Machine;

/// <summary>
/// A VM's life: one thread for each vCPU, and one ("machine") that carries out pause, reset and the end, so that a device may ask for them
/// in the middle of a guest's instruction. Whatever ends the VM first decides its <see cref="Outcome"/>.
/// </summary>
public sealed class VirtualMachine : IMachineControl, IPowerControl, IDisposable
{
    private enum Order
    {
        Pause,
        Resume,
        Reset,
        GuestReset,
        End,
    }

    private readonly record struct Request(Order Order, TaskCompletionSource? Done);

    // Configuration
    private readonly bool _noReboot;
    private readonly Action<string>? _log;

    // Wiring
    private readonly IBoard _board;
    private readonly Thread[] _vcpuThreads;
    private readonly Thread _machineThread;

    // State. One lock guards all of it; nothing foreign is called with it held but IVcpu.Kick, which takes no lock of ours.
    private readonly object _lock = new();
    private readonly Queue<Request> _requests = new();
    private readonly TaskCompletionSource<VmOutcome> _outcome = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private VmState _state = VmState.Created;
    private bool _starting;
    private bool _ending;
    private VmOutcome? _ended;
    private bool _hold = true;
    private int _standing;
    private bool _disposed;

    /// <summary>Builds the board; nothing runs before <see cref="Start"/>.</summary>
    /// <param name="build">Makes the board, whose devices reach the machine through the given power control.</param>
    /// <param name="noReboot">The guest's reset ends the VM.</param>
    /// <param name="log">Told of each step in the VM's life, one line each; any thread.</param>
    public VirtualMachine(Func<IPowerControl, IBoard> build, bool noReboot = false, Action<string>? log = null)
    {
        _noReboot = noReboot;
        _log = log;
        _board = build(this);
        _vcpuThreads = new Thread[_board.Vcpus.Count];
        for (int i = 0; i < _vcpuThreads.Length; i++)
        {
            IVcpu vcpu = _board.Vcpus[i];
            _vcpuThreads[i] = new Thread(() => RunVcpu(vcpu)) { IsBackground = true, Name = $"vcpu{vcpu.Index}" };
        }
        _machineThread = new Thread(CarryOut) { IsBackground = true, Name = "machine" };
    }

    /// <summary>A device had the VM paused; the argument says why. Any thread.</summary>
    public event Action<string>? Halted;

    public VmState State
    {
        get
        {
            lock (_lock)
                return _state;
        }
    }

    public int VcpuCount => _vcpuThreads.Length;

    public IDeviceControl? Devices => _board.Devices;

    /// <summary>Completes when the VM has ended and no vCPU runs any more.</summary>
    public Task<VmOutcome> Outcome => _outcome.Task;

    /// <summary>
    /// Loads the guest and lets it run. What goes wrong in loading is thrown here, and the VM is as before. A VM that somebody ended before or meanwhile has its <see cref="Outcome"/> and does not run.
    /// </summary>
    /// <param name="paused">The VM stands at its first instruction until <see cref="Resume"/>.</param>
    /// <exception cref="InvalidOperationException">The VM was started before.</exception>
    public void Start(bool paused = false)
    {
        lock (_lock)
        {
            if (_starting || _state is VmState.Running or VmState.Paused)
                throw new InvalidOperationException("the VM was started before");
            if (_ending)
                return;
            _starting = true;
        }
        try
        {
            if (paused)
                _board.Clock.Pause();
            _board.Reset();
        }
        catch
        {
            EndStarting(VmState.Created);
            throw;
        }
        if (!EndStarting(paused ? VmState.Paused : VmState.Running))
            return;
        _log?.Invoke(paused ? "start, paused" : "start");
        _machineThread.Start();
        foreach (Thread thread in _vcpuThreads)
            thread.Start();
    }

    public void Pause() => Ask(Order.Pause);

    public void Resume() => Ask(Order.Resume);

    public void Reset() => Ask(Order.Reset);

    public bool PressPowerButton()
    {
        lock (_lock)
        {
            if (_ending || _state is VmState.Created or VmState.Finished)
                return false;
        }
        bool heard = _board.PressPowerButton();
        _log?.Invoke(heard ? "power button" : "power button, which the guest does not listen for");
        return heard;
    }

    public void Stop() => Finish(new VmOutcome(VmEnd.Stopped));

    void IPowerControl.PowerOff() => Finish(new VmOutcome(VmEnd.PoweredOff));

    void IPowerControl.Exit(int code) => Finish(new VmOutcome(VmEnd.GuestExit, code));

    void IPowerControl.Reset()
    {
        if (_noReboot)
            Finish(new VmOutcome(VmEnd.Reset));
        else
            Post(new Request(Order.GuestReset, null));
    }

    /// <summary>A device cannot go on. Who runs the VM hears why, and resumes it when the cause is gone.</summary>
    void IPowerControl.Pause(string reason)
    {
        Post(new Request(Order.Pause, null));
        _log?.Invoke($"paused: {reason}");
        Halted?.Invoke(reason);
    }

    /// <summary>The boards' ACPI tables offer no S3: a guest that asks for it all the same gets what hardware does with an unknown sleep type, nothing.</summary>
    void IPowerControl.Suspend() => _log?.Invoke("the guest asked for S3, which this machine does not offer");

    /// <summary>Ends the VM if it runs, waits for its threads and frees the board.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            if (_disposed)
                return;
            _disposed = true;
        }
        if (_machineThread.ThreadState.HasFlag(ThreadState.Unstarted))
        {
            Finish(new VmOutcome(VmEnd.Stopped));
        }
        else
        {
            Stop();
            _machineThread.Join();
        }
        _board.Dispose();
    }

    /// <summary>The guest is loaded, or could not be.</summary>
    /// <returns>False where somebody ended the VM meanwhile: its outcome was waiting for this.</returns>
    private bool EndStarting(VmState state)
    {
        lock (_lock)
        {
            _starting = false;
            if (_ending)
            {
                _state = VmState.Finished;
                _outcome.SetResult(_ended!);
                return false;
            }
            _state = state;
            _hold = state != VmState.Running;
            return true;
        }
    }

    private void Finish(VmOutcome outcome)
    {
        lock (_lock)
        {
            if (_ending)
                return;
            _ending = true;
            _hold = true;
            _ended = outcome;
            if (_starting)
                return;
            if (_state == VmState.Created)
            {
                _state = VmState.Finished;
                _outcome.SetResult(outcome);
                return;
            }
        }
        Post(new Request(Order.End, null));
    }

    private void Ask(Order order)
    {
        TaskCompletionSource done = new(TaskCreationOptions.RunContinuationsAsynchronously);
        lock (_lock)
        {
            if (_ending || _state is VmState.Created or VmState.Finished)
                return;
        }
        Post(new Request(order, done));
        done.Task.GetAwaiter().GetResult();
    }

    private void Post(Request request)
    {
        bool stops = request.Order != Order.Resume;
        lock (_lock)
        {
            if (_state == VmState.Finished)
            {
                request.Done?.SetResult();
                return;
            }
            // Several reset lines pulled at once are one reset.
            if (request.Order == Order.GuestReset && _requests.Contains(request))
                return;
            // From here on no vCPU begins another run, so that a guest that asked for its reset does not run past it.
            if (stops)
                _hold = true;
            _requests.Enqueue(request);
            Monitor.PulseAll(_lock);
        }
        if (stops)
            KickAll();
    }

    private void KickAll()
    {
        foreach (IVcpu vcpu in _board.Vcpus)
            vcpu.Kick();
    }

    private void RunVcpu(IVcpu vcpu)
    {
        try
        {
            while (StandUntilRunning())
            {
                switch (vcpu.Run())
                {
                    case VcpuExit.TripleFault:
                        Finish(new VmOutcome(VmEnd.TripleFault, Report: vcpu.FailureReport));
                        break;
                    case VcpuExit.Failure:
                        Finish(new VmOutcome(VmEnd.Failure, Report: vcpu.FailureReport));
                        break;
                    default:
                        break;
                }
            }
        }
        catch (Exception e)
        {
            // A defect of ours, not the guest's doing: the VM ends with the trace, and others in this process live on.
            Finish(new VmOutcome(VmEnd.Failure, Report: $"vcpu{vcpu.Index}: {e}"));
            lock (_lock)
            {
                _standing++;
                Monitor.PulseAll(_lock);
            }
        }
    }

    /// <summary>Where a vCPU's thread stands while the VM is held.</summary>
    /// <returns>False where the VM has ended.</returns>
    private bool StandUntilRunning()
    {
        lock (_lock)
        {
            if (!_hold)
                return true;
            _standing++;
            Monitor.PulseAll(_lock);
            while (_hold && _state != VmState.Finished)
                Monitor.Wait(_lock);
            if (_state == VmState.Finished)
                return false;
            _standing--;
            return true;
        }
    }

    private void CarryOut()
    {
        while (true)
        {
            Request request = Next();
            try
            {
                switch (request.Order)
                {
                    case Order.Pause:
                        _board.Clock.Pause();
                        _board.Pause();
                        SetState(VmState.Paused);
                        _log?.Invoke("pause");
                        break;
                    case Order.Resume:
                        _board.Resume();
                        _board.Clock.Resume();
                        SetState(VmState.Running);
                        _log?.Invoke("resume");
                        break;
                    case Order.Reset:
                    case Order.GuestReset:
                        _log?.Invoke(request.Order == Order.Reset ? "reset" : "reset by the guest");
                        _board.Reset();
                        break;
                    default:
                        break;
                }
            }
            catch (Exception e)
            {
                Finish(new VmOutcome(VmEnd.Failure, Report: $"{request.Order}: {e.Message}"));
            }
            bool over = Settle(request.Order);
            request.Done?.SetResult();
            if (over)
                return;
        }
    }

    /// <summary>Takes the next request, with all vCPUs standing.</summary>
    private Request Next()
    {
        lock (_lock)
        {
            while (true)
            {
                if (_requests.TryPeek(out Request request) && (request.Order == Order.Resume || _standing == _vcpuThreads.Length))
                    return _requests.Dequeue();
                Monitor.Wait(_lock);
            }
        }
    }

    private void SetState(VmState state)
    {
        lock (_lock)
            _state = state;
    }

    /// <summary>Lets the vCPUs run again where nothing more keeps them, or ends the VM.</summary>
    private bool Settle(Order order)
    {
        if (order != Order.End)
        {
            lock (_lock)
            {
                if (!_ending && _requests.Count == 0 && _state == VmState.Running)
                    _hold = false;
                Monitor.PulseAll(_lock);
                return false;
            }
        }
        _board.Clock.Pause();
        VmOutcome outcome;
        lock (_lock)
        {
            _state = VmState.Finished;
            outcome = _ended!;
            // Who asked for something after the end is not left waiting.
            while (_requests.TryDequeue(out Request late))
                late.Done?.SetResult();
            Monitor.PulseAll(_lock);
        }
        foreach (Thread thread in _vcpuThreads)
            thread.Join();
        _log?.Invoke($"end: {outcome.End}");
        _outcome.SetResult(outcome);
        return true;
    }
}
