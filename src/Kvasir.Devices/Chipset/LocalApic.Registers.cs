using System;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>The two windows on the registers: memory in xAPIC mode, MSRs in x2APIC mode.</summary>
public sealed partial class LocalApic
{
    private const uint ReservedWrite = 0;

    /// <summary>Registers are 32 bits at multiples of 16 bytes. Narrower reads cut them; what lies between reads as zero.</summary>
    public ulong Read(ulong offset, AccessSize size)
    {
        uint within = (uint)offset & 0xf;
        if (within > 3)
            return 0;
        uint value;
        lock (_lock)
            value = ReadRegister((Register)((uint)offset & 0xff0));
        return value >> (int)within * 8 & (size >= AccessSize.Dword ? uint.MaxValue : (1u << (int)size * 8) - 1);
    }

    /// <summary>Only aligned writes of at least 32 bits reach a register; the SDM leaves all others undefined.</summary>
    public void Write(ulong offset, AccessSize size, ulong value)
    {
        if ((offset & 0xf) != 0 || size < AccessSize.Dword)
            return;
        WriteRegister((Register)((uint)offset & 0xff0), (uint)value);
    }

    public bool TryReadMsr(uint msr, out ulong value)
    {
        lock (_lock)
        {
            value = 0;
            switch (msr)
            {
                case MsrApicBase:
                    value = _state.Base;
                    return true;
                case MsrTscDeadline:
                    if (!_features.TscDeadline)
                        return false;
                    value = ReadTscDeadline();
                    return true;
                case >= MsrX2ApicFirst and <= MsrX2ApicLast:
                    return InX2ApicMode && TryReadX2Apic((Register)((msr - MsrX2ApicFirst) << 4), out value);
                default:
                    return false;
            }
        }
    }

    public bool TryWriteMsr(uint msr, ulong value)
    {
        switch (msr)
        {
            case MsrApicBase:
                lock (_lock)
                    return TrySetBase(value);
            case MsrTscDeadline:
                if (!_features.TscDeadline)
                    return false;
                lock (_lock)
                    SetTscDeadline(value);
                return true;
            case >= MsrX2ApicFirst and <= MsrX2ApicLast:
                return TryWriteX2Apic((Register)((msr - MsrX2ApicFirst) << 4), value);
            default:
                return false;
        }
    }

    /// <summary>Mode changes (SDM figure "Local x2APIC State Transitions with IA32_APIC_BASE, INIT, and Reset").</summary>
    private bool TrySetBase(ulong value)
    {
        ulong defined = (ulong)(ApicBase.BootProcessor | ApicBase.Enable) | (_features.X2Apic ? (ulong)ApicBase.X2Apic : 0)
            | (((1ul << _features.PhysicalAddressBits) - 1) & ~0xffful);
        if ((value & ~defined) != 0)
            return false;
        bool enable = (value & (ulong)ApicBase.Enable) != 0;
        bool x2 = (value & (ulong)ApicBase.X2Apic) != 0;
        if (x2 && (!enable || (!InX2ApicMode && !HardwareEnabled)))
            return false;
        if (InX2ApicMode && enable && !x2)
            return false;
        bool entersX2 = x2 && !InX2ApicMode;
        bool switchesOff = HardwareEnabled && !enable;
        _state.Base = value;
        if (switchesOff)
            ResetRegisters();
        if (entersX2)
            _state.Command &= uint.MaxValue;
        Evaluate();
        return true;
    }

    private bool TryReadX2Apic(Register register, out ulong value)
    {
        value = 0;
        switch (register)
        {
            case Register.Command:
                value = _state.Command;
                return true;
            case Register.Id:
                value = Id;
                return true;
            case Register.LogicalDestination:
                value = X2LogicalDestination(Id);
                return true;
            case Register.LvtCmci when !_features.Cmci:
                return false;
            case Register.TaskPriority or Register.Version or Register.ProcessorPriority or Register.Spurious or Register.ErrorStatus:
            case >= Register.InService and < Register.ErrorStatus:
            case Register.LvtCmci:
            case >= Register.LvtTimer and <= Register.CurrentCount:
            case Register.DivideConfiguration:
                value = ReadRegister(register);
                return true;
            default:
                return false;
        }
    }

    private bool TryWriteX2Apic(Register register, ulong value)
    {
        lock (_lock)
        {
            if (!InX2ApicMode)
                return false;
        }
        if (register == Register.Command)
        {
            if ((value & Command.Reserved) != 0)
                return false;
            SendCommand(value, wide: true);
            return true;
        }
        ulong defined;
        switch (register)
        {
            case Register.TaskPriority:
            case Register.SelfIpi:
                defined = 0xff;
                break;
            case Register.Eoi:
            case Register.ErrorStatus:
                defined = ReservedWrite;
                break;
            case Register.Spurious:
                defined = (ulong)Svr.Writable;
                break;
            case Register.LvtCmci when !_features.Cmci:
                return false;
            case Register.LvtCmci or Register.LvtTimer or Register.LvtThermal or Register.LvtPerformance:
            case Register.LvtLint0 or Register.LvtLint1 or Register.LvtError:
                defined = (ulong)(WritableOf(register) | Lvt.ReadOnly);
                break;
            case Register.InitialCount:
                defined = uint.MaxValue;
                break;
            case Register.DivideConfiguration:
                defined = 0xb;
                break;
            default:
                return false;
        }
        if ((value & ~defined) != 0)
            return false;
        if (register == Register.SelfIpi)
            SendCommand(value | (ulong)DestinationShorthand.Self << 18, wide: true, keep: false);
        else
            WriteRegister(register, (uint)value);
        return true;
    }

    private uint ReadRegister(Register register)
    {
        switch (register)
        {
            case Register.Id:
                return Id << 24;
            case Register.Version:
                // Integrated APIC 14h, highest local vector entry, EOI broadcasts can be suppressed.
                return 0x14u | (_features.Cmci ? 6u : 5u) << 16 | 1u << 24;
            case Register.TaskPriority:
                return _state.TaskPriority;
            case Register.ArbitrationPriority:
                return ArbitrationPriority();
            case Register.ProcessorPriority:
                return _priority;
            case Register.Eoi:
            case Register.RemoteRead:
                return 0;
            case Register.LogicalDestination:
                return _state.LogicalDestination;
            case Register.DestinationFormat:
                return _state.DestinationFormat;
            case Register.Spurious:
                return _state.Spurious;
            case >= Register.InService and < Register.TriggerMode:
                return _state.InService.Register((int)(register - Register.InService) >> 4);
            case >= Register.TriggerMode and < Register.Request:
                return _state.TriggerMode.Register((int)(register - Register.TriggerMode) >> 4);
            case >= Register.Request and < Register.ErrorStatus:
                return _state.Request.Register((int)(register - Register.Request) >> 4);
            case Register.ErrorStatus:
                return _state.ErrorStatus;
            case Register.Command:
                return (uint)_state.Command;
            case Register.CommandHigh:
                return (uint)(_state.Command >> 32);
            case Register.LvtCmci when _features.Cmci:
                return _state.LvtCmci;
            case >= Register.LvtTimer and <= Register.LvtError:
                return LvtOf(LocalVectorOf(register));
            case Register.InitialCount:
                return _state.InitialCount;
            case Register.CurrentCount:
                return CurrentCount();
            case Register.DivideConfiguration:
                return _state.DivideConfiguration;
            default:
                RecordError(Errors.IllegalRegister);
                Evaluate();
                return 0;
        }
    }

    private void WriteRegister(Register register, uint value)
    {
        int broadcast = -1;
        bool switchedOn = false;
        if (register == Register.Command)
        {
            ulong high;
            lock (_lock)
                high = _state.Command & 0xffff_ffff_0000_0000;
            SendCommand(high | value, wide: false);
            return;
        }
        lock (_lock)
        {
            switch (register)
            {
                case Register.Id:
                case Register.Version:
                case Register.ArbitrationPriority:
                case Register.ProcessorPriority:
                case Register.RemoteRead:
                case >= Register.InService and < Register.ErrorStatus:
                case Register.CurrentCount:
                    break;
                case Register.TaskPriority:
                    _state.TaskPriority = (byte)value;
                    break;
                case Register.Eoi:
                    broadcast = EndOfInterrupt();
                    break;
                case Register.LogicalDestination:
                    _state.LogicalDestination = value & 0xff00_0000;
                    break;
                case Register.DestinationFormat:
                    _state.DestinationFormat = value | 0x0fff_ffff;
                    break;
                case Register.Spurious:
                    switchedOn = SetSpurious(value & (uint)Svr.Writable);
                    break;
                case Register.ErrorStatus:
                    // A write latches what was recorded since the last one.
                    _state.ErrorStatus = _state.PendingErrors;
                    _state.PendingErrors = 0;
                    break;
                case Register.CommandHigh:
                    _state.Command = (uint)_state.Command | (ulong)(value & 0xff00_0000) << 32;
                    break;
                case Register.LvtCmci when _features.Cmci:
                case >= Register.LvtTimer and <= Register.LvtError:
                    SetLocalVector(register, value);
                    break;
                case Register.InitialCount:
                    SetInitialCount(value);
                    break;
                case Register.DivideConfiguration:
                    SetDivider(value);
                    break;
                default:
                    RecordError(Errors.IllegalRegister);
                    break;
            }
            Evaluate();
        }
        if (broadcast >= 0)
            _bus.BroadcastEoi((byte)broadcast);
        if (switchedOn)
            _bus.RetryLevels();
    }

    /// <summary>Bits 7:0 of APR: what this APIC would bid in an arbitration (SDM "Arbitration Priority Register").</summary>
    private uint ArbitrationPriority()
    {
        int task = _state.TaskPriority;
        int request = Math.Max(_state.Request.Highest, 0);
        int service = Math.Max(_state.InService.Highest, 0);
        if (task >> 4 >= request >> 4 && task >> 4 > service >> 4)
            return (uint)task;
        return (uint)Math.Max(task & 0xf0, Math.Max(request & 0xf0, service & 0xf0));
    }

    private bool SetSpurious(uint value)
    {
        bool before = SoftwareEnabled;
        _state.Spurious = value;
        if (SoftwareEnabled)
            return !before;
        // All local vectors are masked while the APIC is disabled, and stay so after.
        for (LocalVector v = LocalVector.Cmci; v <= LocalVector.Error; v++)
            LvtOf(v) |= (uint)Lvt.Masked;
        return false;
    }

    private void SetLocalVector(Register register, uint value)
    {
        uint writable = (uint)WritableOf(register);
        ref uint lvt = ref LvtOf(LocalVectorOf(register));
        uint set = (value & writable) | (lvt & (uint)Lvt.RemoteIrr);
        if (!SoftwareEnabled)
            set |= (uint)Lvt.Masked;
        switch (register)
        {
            case Register.LvtTimer:
                if (!_features.TscDeadline)
                    set &= ~(2u << 17);
                SetTimerVector(set);
                break;
            case Register.LvtLint0:
            case Register.LvtLint1:
                // Remote IRR belongs to level-triggered fixed interrupts alone.
                if ((set & (uint)Lvt.LevelTriggered) == 0 || ModeOf(set) != DeliveryMode.Fixed)
                    set &= ~(uint)Lvt.RemoteIrr;
                lvt = set;
                if ((set & (uint)Lvt.LevelTriggered) != 0)
                    RequestLevelPin(ref lvt, register == Register.LvtLint0 ? _state.Lint0 : _state.Lint1);
                break;
            default:
                lvt = set;
                break;
        }
    }

    private static LocalVector LocalVectorOf(Register register) => register switch
    {
        Register.LvtCmci => LocalVector.Cmci,
        Register.LvtTimer => LocalVector.Timer,
        Register.LvtThermal => LocalVector.Thermal,
        Register.LvtPerformance => LocalVector.Performance,
        Register.LvtLint0 => LocalVector.Lint0,
        Register.LvtLint1 => LocalVector.Lint1,
        _ => LocalVector.Error,
    };

    private static Lvt WritableOf(Register register) => register switch
    {
        Register.LvtTimer => Lvt.WritableTimer,
        Register.LvtLint0 or Register.LvtLint1 => Lvt.WritablePin,
        Register.LvtError => Lvt.WritableError,
        _ => Lvt.WritableSource,
    };

    /// <summary>Writes the interrupt command register and sends what it says, without the lock.</summary>
    private void SendCommand(ulong value, bool wide, bool keep = true)
    {
        Command command = new(value);
        ApicMessage message;
        lock (_lock)
        {
            if (keep)
                _state.Command = value & (wide ? ~0x1000ul : 0xff00_0000_000c_cfff);
            if (command.Mode is DeliveryMode.Fixed or DeliveryMode.LowestPriority && command.Vector < 16)
            {
                RecordError(Errors.SendIllegalVector);
                Evaluate();
                return;
            }
            // The INIT level de-assert of old arbitration IDs has no effect since the Pentium 4.
            if (command.Mode == DeliveryMode.Init && command.LevelTriggered && !command.Assert)
                return;
            // The bus has no ExtINT or remote read for IPIs.
            if (command.Mode is DeliveryMode.RemoteRead or DeliveryMode.ExtInt)
                return;
            message = new ApicMessage(
                command.Mode, command.Vector, Level: false, wide ? command.WideDestination : command.Destination, command.Logical, wide);
        }
        if (command.Shorthand == DestinationShorthand.None)
            _bus.Deliver(message);
        else
            _bus.Deliver(this, command.Shorthand, message);
    }
}
