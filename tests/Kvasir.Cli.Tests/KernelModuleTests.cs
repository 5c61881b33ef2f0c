using System.Collections.Generic;
using System.Text;
using Kvasir.Cli.Guests;
using Xunit;

namespace Kvasir.Cli.Tests;

public sealed class KernelModuleTests
{
    private static KernelModule Module(string file, string info) => KernelModule.Read(file, Encoding.Latin1.GetBytes($"\u007fELF....\0{info.Replace('|', '\0')}\0rest"));

    [Fact]
    public void AModuleIsReadFromItsInformation()
    {
        KernelModule module = Module("virtio-rng.ko", "license=GPL|alias=virtio:d00000004v*|alias=other|depends=virtio,virtio_ring|name=virtio_rng");
        Assert.Equal("virtio_rng", module.Name);
        Assert.Equal(["virtio", "virtio_ring"], module.Depends);
        Assert.Equal(["virtio:d00000004v*", "other"], module.Aliases);
    }

    [Fact]
    public void WhatANeededModuleNeedsIsLoadedBeforeIt()
    {
        List<KernelModule> modules =
        [
            Module("a.ko", "depends=b"),
            Module("b.ko", "depends=c,built_in"),
            Module("c.ko", "depends="),
        ];
        Assert.Equal("a.ko: b.ko c.ko\nb.ko: c.ko\nc.ko:\n", KernelModule.Dependencies(modules));
    }

    [Fact]
    public void AFileThatIsNoModuleHasNothingToSay()
    {
        KernelModule module = KernelModule.Read("x.ko", new byte[100]);
        Assert.Empty(module.Depends);
        Assert.Empty(module.Aliases);
    }
}
