using System;
using System.Collections.Generic;
using System.IO;
using Kvasir.Boot;
using Kvasir.Boot.Firmware;
using Kvasir.Boot.Kernels;
using Kvasir.Core;

namespace Kvasir.Machine;

/// <summary>
/// What a VM executes first: firmware in ROM, or a kernel that is loaded at each reset. Files are read again then, so that a VM that reboots gets a
/// new kernel as a real machine would.
/// </summary>
internal sealed class GuestSoftware(VmConfiguration configuration)
{
    /// <summary>The image in ROM; empty where a kernel is booted directly.</summary>
    private byte[] _firmware = [];

    /// <summary>A kernel starts as if firmware had run before it.</summary>
    public bool SkipsFirmware => configuration.Kernel is not null;

    /// <summary>Puts what survives resets in place. Once, before anything runs.</summary>
    /// <exception cref="MachineException">A file cannot be read or is not what it should be.</exception>
    public void Install(GuestMemory memory)
    {
        if (configuration.Firmware is null)
            return;
        try
        {
            _firmware = Read("firmware", configuration.Firmware);
            FirmwareImage.Map(memory, _firmware);
        }
        catch (BootException e)
        {
            throw new MachineException($"{configuration.Firmware}: {e.Message}", e);
        }
    }

    /// <summary>Loads the kernel, or lets the firmware show where real mode looks for it.</summary>
    /// <returns>The boot processor's state.</returns>
    /// <exception cref="MachineException">A file cannot be read, is not what it should be, or does not fit.</exception>
    public CpuState Load(GuestMemory memory, BoardDescription description, uint signature)
    {
        if (configuration.Kernel is null)
        {
            FirmwareImage.Shadow(memory, _firmware);
            return CpuState.AtReset(signature);
        }
        byte[] kernel = Read("kernel", configuration.Kernel);
        try
        {
            return KernelLoader.Load(memory, description, new BootRequest
            {
                Kernel = kernel,
                KernelName = configuration.Kernel,
                CommandLine = configuration.KernelCommandLine,
                Modules = Modules(),
            }).Cpu;
        }
        catch (BootException e)
        {
            throw new MachineException($"{configuration.Kernel}: {e.Message}", e);
        }
    }

    /// <summary>
    /// One file, or a multiboot kernel's modules as <c>path arguments,path arguments</c> (a comma in a path or an argument is doubled). A file that has the whole
    /// text as its name is that file.
    /// </summary>
    private List<BootModule> Modules()
    {
        List<BootModule> modules = [];
        if (configuration.InitialRamdisk is not { } text)
            return modules;
        if (File.Exists(text))
        {
            modules.Add(new BootModule(Read("initial file system", text)));
            return modules;
        }
        const char commaInside = '\0';
        foreach (string part in text.Replace(",,", "\0", StringComparison.Ordinal).Split(','))
        {
            string module = part.Replace(commaInside, ',').Trim();
            string path = module.Split(' ', 2)[0];
            modules.Add(new BootModule(Read("initial file system", path), module));
        }
        return modules;
    }

    private static byte[] Read(string what, string path)
    {
        try
        {
            return File.ReadAllBytes(path);
        }
        catch (Exception e) when (e is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new MachineException($"cannot read the {what} '{path}': there is no such file", e);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new MachineException($"cannot read the {what} '{path}': {e.Message}", e);
        }
    }
}
