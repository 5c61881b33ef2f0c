using System;
using System.Collections.Generic;
using System.Linq;
using Xunit;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>The system cases, executed one instruction at a time, in blocks, and translated.</summary>
public class SystemTests
{
    private static readonly Dictionary<string, SystemCase> Cases = Collect();

    public static TheoryData<string, Execution> Names()
    {
        TheoryData<string, Execution> data = [];
        foreach (string name in Cases.Keys)
        {
            data.Add(name, Execution.Stepped);
            data.Add(name, Execution.Interpreted);
            data.Add(name, Execution.Translated);
        }
        return data;
    }

    [Theory]
    [MemberData(nameof(Names))]
    public void Ends_as_hardware_would(string name, Execution execution) => SystemRunner.Check(Cases[name], execution);

    private static Dictionary<string, SystemCase> Collect()
    {
        IEnumerable<SystemCase> all = [.. ExceptionCases.All(), .. TransferCases.All(), .. ModeCases.All(), .. PagingCases.All(), .. DebugCases.All(), .. MsrCases.All()];
        return all.ToDictionary(c => c.Name, StringComparer.Ordinal);
    }
}
