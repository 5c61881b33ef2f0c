using System;
using System.Collections.Generic;
using System.Linq;
using Xunit;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>The system cases, executed in blocks and one instruction at a time.</summary>
public class SystemTests
{
    private static readonly Dictionary<string, SystemCase> Cases = Collect();

    public static TheoryData<string, bool> Names()
    {
        TheoryData<string, bool> data = [];
        foreach (string name in Cases.Keys)
        {
            data.Add(name, false);
            data.Add(name, true);
        }
        return data;
    }

    [Theory]
    [MemberData(nameof(Names))]
    public void Ends_as_hardware_would(string name, bool stepping) => SystemRunner.Check(Cases[name], stepping);

    private static Dictionary<string, SystemCase> Collect()
    {
        IEnumerable<SystemCase> all = [.. ExceptionCases.All(), .. TransferCases.All(), .. ModeCases.All(), .. PagingCases.All(), .. DebugCases.All(), .. MsrCases.All()];
        return all.ToDictionary(c => c.Name, StringComparer.Ordinal);
    }
}
