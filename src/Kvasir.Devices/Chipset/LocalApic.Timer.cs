using System;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>The APIC timer. All that is kept is when it expires: counts are derived, so nothing drifts and nothing ticks.</summary>
public sealed partial class LocalApic
{
    private TimerMode Mode => ModeOf(_state);

    private long Divisor => DivisorOf(_state);

    private long Period => _state.InitialCount * Divisor;

    /// <summary>Before this there is no timer interrupt: <see cref="LocalApicFeatures.TimerSpacing"/>.</summary>
    private long _nextTimer;

    /// <summary>When the timer of a state expires that counts elsewhere.</summary>
    /// <param name="state">All but the expiry.</param>
    /// <param name="currentCount">What its count is now.</param>
    /// <param name="clock">Now.</param>
    /// <returns>Guest nanoseconds; <see cref="long.MaxValue"/> where it stands.</returns>
    public static long ExpiryOf(in State state, uint currentCount, VmClock clock)
    {
        if (ModeOf(state) == TimerMode.TscDeadline)
            return DeadlineOf(state, clock);
        return currentCount == 0 ? long.MaxValue : clock.Now + currentCount * DivisorOf(state);
    }

    private static TimerMode ModeOf(in State state) => (TimerMode)(state.LvtTimer >> 17 & 3);

    /// <summary>Nanoseconds a count, 1 to 128: DCR bits 3, 1, 0 are 111 for 1, and otherwise the power of two less one.</summary>
    private static long DivisorOf(in State state)
    {
        uint code = (state.DivideConfiguration & 3) | (state.DivideConfiguration >> 1 & 4);
        return code == 7 ? 1 : 2L << (int)code;
    }

    private static long DeadlineOf(in State state, VmClock clock)
    {
        if (state.TscDeadline == 0)
            return long.MaxValue;
        Int128 ticks = (Int128)state.TscDeadline - state.TscOffset;
        return ticks <= 0 ? 0 : ticks >= long.MaxValue ? long.MaxValue : VmClock.ToNanoseconds((ulong)ticks, clock.TscFrequency);
    }

    private void OnTimer()
    {
        lock (_lock)
        {
            ServiceTimer();
            Evaluate();
        }
    }

    /// <summary>Delivers an expiry that has come. A call-back that a re-arming guest has overtaken finds nothing to do.</summary>
    private void ServiceTimer()
    {
        long now = _clock.Now;
        if (now < _state.Expiry || now < _nextTimer)
            return;
        if (_features.TimerSpacing > 0)
            _nextTimer = now + _features.TimerSpacing;
        switch (Mode)
        {
            case TimerMode.Periodic when Period > 0:
                _state.Expiry += ((now - _state.Expiry) / Period + 1) * Period;
                break;
            case TimerMode.TscDeadline:
                _state.TscDeadline = 0;
                _state.Expiry = long.MaxValue;
                break;
            default:
                _state.Expiry = long.MaxValue;
                break;
        }
        DeliverLocal(LocalVector.Timer);
        ArmTimer();
    }

    private void ArmTimer()
    {
        if (_state.Expiry == long.MaxValue)
            _timer.Disarm();
        else if (Mode == TimerMode.Periodic && Period < MinimumPeriod)
            _timer.Arm(Math.Max(Math.Max(_state.Expiry, _nextTimer), _clock.Now + MinimumPeriod));
        else
            _timer.Arm(Math.Max(_state.Expiry, _nextTimer));
    }

    private void SetInitialCount(uint count)
    {
        if (Mode == TimerMode.TscDeadline)
            return;
        _state.InitialCount = count;
        _state.Expiry = count == 0 ? long.MaxValue : _clock.Now + Period;
        ArmTimer();
    }

    private uint CurrentCount()
    {
        ServiceTimer();
        Evaluate();
        if (Mode == TimerMode.TscDeadline || _state.Expiry == long.MaxValue)
            return 0;
        long left = _state.Expiry - _clock.Now;
        return left <= 0 ? 0 : (uint)Math.Min((left + Divisor - 1) / Divisor, uint.MaxValue);
    }

    /// <summary>A new divider: the count goes on from where it is at the new rate.</summary>
    private void SetDivider(uint value)
    {
        uint count = CurrentCount();
        _state.DivideConfiguration = value & 0xb;
        if (Mode == TimerMode.TscDeadline || _state.Expiry == long.MaxValue)
            return;
        _state.Expiry = _clock.Now + count * Divisor;
        ArmTimer();
    }

    private void SetTimerVector(uint value)
    {
        // A count that has run out counts for the old mode, not for the new one.
        ServiceTimer();
        TimerMode before = Mode;
        _state.LvtTimer = value;
        // Both ways between TSC-deadline and counting disarm the timer (SDM "TSC-Deadline Mode").
        if (before != Mode && (before == TimerMode.TscDeadline || Mode == TimerMode.TscDeadline))
        {
            _state.InitialCount = 0;
            _state.TscDeadline = 0;
            _state.Expiry = long.MaxValue;
        }
        ArmTimer();
    }

    private void SetTscDeadline(ulong value)
    {
        if (Mode != TimerMode.TscDeadline)
            return;
        _state.TscDeadline = value;
        StartDeadline();
    }

    private ulong ReadTscDeadline()
    {
        ServiceTimer();
        Evaluate();
        return Mode == TimerMode.TscDeadline ? _state.TscDeadline : 0;
    }

    private void StartDeadline()
    {
        _state.Expiry = DeadlineOf(_state, _clock);
        ArmTimer();
        // A deadline in the past interrupts at once, not when the clock's thread gets to it.
        ServiceTimer();
        Evaluate();
    }
}
