using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Boot.Kernels;

/// <summary>A module in guest memory.</summary>
/// <param name="Arguments">Address of its string, or 0 for none.</param>
internal readonly record struct PlacedModule(ulong Start, ulong Length, ulong Arguments)
{
    /// <summary>Puts modules behind the kernel, each on a page of its own, and their strings into conventional memory.</summary>
    /// <param name="from">Where the kernel ends: many take what lies behind their modules before they know the memory map.</param>
    /// <param name="textFrom">Where strings may go from.</param>
    public static IReadOnlyList<PlacedModule> PlaceAll(BootMemory memory, IReadOnlyList<BootModule> modules, ulong from, ulong textFrom)
    {
        List<PlacedModule> placed = [];
        foreach (BootModule module in modules)
        {
            // An empty module still has a place of its own.
            ulong room = module.Content.IsEmpty ? 1 : (ulong)module.Content.Length;
            ulong start = memory.ReserveLowest("module", room, GuestMemory.PageSize, from, memory.LowEnd);
            memory.Write(start, module.Content.Span);
            ulong arguments = 0;
            if (module.Arguments is { Length: > 0 })
            {
                byte[] text = BootText.ToBytes(module.Arguments, "module's string");
                arguments = memory.ReserveLowest("module's string", (ulong)text.Length, 16, textFrom, ChipsetAddresses.Ebda);
                memory.Write(arguments, text);
            }
            placed.Add(new PlacedModule(start, (ulong)module.Content.Length, arguments));
        }
        return placed;
    }
}
