using System.Collections.Generic;
using System.Linq;
using Kvasir.Machine;

namespace Kvasir.Cli.Options;

/// <summary><c>--boot KIND[,KIND]</c> and the disks' own <c>bootindex</c>, made into one order.</summary>
internal static class BootOrder
{
    /// <summary>
    /// Numbers disks by the order in which firmware tries them: those with a number of their own, then each kind that <c>--boot</c> names, then the rest, disks before CDs.
    /// </summary>
    /// <exception cref="CommandException">A kind is not known, or two disks have the same number.</exception>
    public static IReadOnlyList<DiskConfiguration> Apply(string? text, IReadOnlyList<DiskConfiguration> disks)
    {
        if (disks.Where(disk => disk.BootIndex is not null).GroupBy(disk => disk.BootIndex).FirstOrDefault(group => group.Count() > 1) is { } twice)
            throw new CommandException(ExitCode.Usage, $"--disk: bootindex: {twice.Key} is given to two disks");
        List<bool> kinds = [];
        foreach (string kind in (text ?? "disk,cdrom").Split(','))
        {
            kinds.Add(kind switch
            {
                "disk" => false,
                "cdrom" => true,
                "net" or "floppy" => throw new CommandException(ExitCode.Usage, $"--boot: {kind} is not supported yet; disk and cdrom are"),
                _ => throw new CommandException(ExitCode.Usage, $"--boot: '{kind}' is none of disk, cdrom"),
            });
        }
        if (text is not null && !disks.Any(disk => kinds.Contains(disk.Settings.IsCd)))
            throw new CommandException(ExitCode.Usage, $"--boot: the VM has no {text}");
        List<DiskConfiguration> order = [.. disks.OrderBy(disk => disk.BootIndex ?? int.MaxValue).ThenBy(disk => kinds.IndexOf(disk.Settings.IsCd) is var at and >= 0 ? at : kinds.Count)];
        return [.. disks.Select(disk => disk with { BootIndex = order.IndexOf(disk) })];
    }
}
