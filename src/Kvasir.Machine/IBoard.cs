using System;
using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Machine;

/// <summary>A built machine as its life needs it: processors, time, and the reset line.</summary>
public interface IBoard : IDisposable
{
    IReadOnlyList<IVcpu> Vcpus { get; }

    VmClock Clock { get; }

    /// <summary>The devices by name, for a monitor; null on a board that has none to show.</summary>
    IDeviceControl? Devices => null;

    /// <summary>
    /// What RESET does: every device goes to its power-on state, the guest's first software is loaded and each vCPU's state set. Also the
    /// first start. Called only while no vCPU runs.
    /// </summary>
    void Reset();

    /// <summary>Has all devices with threads of their own stand still; guest memory does not change from here on. All vCPUs stand.</summary>
    void Pause();

    /// <summary>Lets them go on.</summary>
    void Resume();

    /// <summary>Presses the ACPI power button. Any thread.</summary>
    /// <returns>Whether the guest asked to hear of it.</returns>
    bool PressPowerButton();
}
