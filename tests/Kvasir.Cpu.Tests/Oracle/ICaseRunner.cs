using System;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>A processor that cases are compared on with the host's.</summary>
internal unsafe interface ICaseRunner : IDisposable
{
    /// <summary>It decodes as AMD's processors do.</summary>
    bool IsAmd { get; }

    /// <summary>The window after the last run that kept it.</summary>
    byte* WindowBytes { get; }

    /// <summary>Runs one instruction of a record's input.</summary>
    /// <param name="record">The case; only its output may have been used before.</param>
    /// <param name="outcome">Gets <see cref="OracleRecord.Out"/> and what follows it.</param>
    /// <param name="keepWindow">The window keeps what the code left there.</param>
    void Step(OracleRecord* record, OracleRecord* outcome, bool keepWindow = false);

    /// <summary>Runs a record's input as blocks, up to its end or a fault.</summary>
    /// <inheritdoc cref="Step"/>
    void RunBlock(OracleRecord* record, OracleRecord* outcome, bool keepWindow = false);

    /// <summary>Makes the window pristine after a run that kept it.</summary>
    void Clean();
}
