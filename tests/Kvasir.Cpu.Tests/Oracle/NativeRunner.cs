using System;
using System.Diagnostics;
using System.IO;
using System.Runtime.Intrinsics.X86;
using System.Security.Cryptography;
using System.Threading.Tasks;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>
/// Runs records on the host's processor, in a helper process compiled from oracle.c: a fault there must not reach the runtime's own signal handlers, and code of
/// all modes needs addresses below 4 GiB.
/// </summary>
internal sealed class NativeRunner : IDisposable
{
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(60);
    private readonly string _program;
    private readonly SharedArea _area;
    private readonly byte[] _message = new byte[4];
    private Process _process;

    private NativeRunner(string program, SharedArea area)
    {
        _program = program;
        _area = area;
        _process = Start();
    }

    /// <summary>Why there can be no helper on this host, or null.</summary>
    public static string? Obstacle()
    {
        if (!Avx2.IsSupported || !Fma.IsSupported)
            return "the host's processor has no AVX2 and FMA";
        try
        {
            Compile();
            return null;
        }
        catch (IOException e)
        {
            return e.Message;
        }
    }

    public static NativeRunner Create(SharedArea area) => new(Compile(), area);

    /// <summary>Runs the first <paramref name="count"/> records.</summary>
    /// <param name="count">At most <see cref="SharedArea.Batch"/>.</param>
    /// <param name="keepWindow">The window keeps what the last record left in it, for a report.</param>
    public void Run(int count, bool keepWindow = false)
    {
        BitConverter.TryWriteBytes(_message, count | (keepWindow ? 1 << 31 : 0));
        string failure;
        try
        {
            _process.StandardInput.BaseStream.Write(_message);
            _process.StandardInput.BaseStream.Flush();
            Task<int> answer = _process.StandardOutput.BaseStream.ReadAsync(_message, 0, 4);
            if (answer.Wait(Patience) && answer.Result == 4)
                return;
            failure = answer.IsCompleted ? "ended" : "hangs";
        }
        catch (IOException e)
        {
            failure = "is gone: " + e.Message;
        }
        uint at = _area.Progress;
        Stop();
        _process = Start();
        throw new HelperFailedException((int)at, $"the helper process {failure} at record {at} of {count}");
    }

    public void Dispose() => Stop();

    private static string Compile()
    {
        using Stream source = typeof(NativeRunner).Assembly.GetManifestResourceStream("oracle.c")!;
        using StreamReader reader = new(source);
        string text = reader.ReadToEnd();
        string name = "kvasir-oracle-" + Convert.ToHexString(SHA256.HashData(System.Text.Encoding.UTF8.GetBytes(text)))[..16];
        string program = Path.Combine(Path.GetTempPath(), name);
        if (File.Exists(program))
            return program;
        string own = program + "." + Environment.ProcessId;
        File.WriteAllText(own + ".c", text);
        ProcessStartInfo start = new("gcc")
        {
            RedirectStandardError = true,
            // Far from every address that cases are likely to make up.
            ArgumentList =
            {
                "-O2", "-Wall", "-Wextra", "-no-pie", "-fno-pie", "-fno-stack-protector", "-fcf-protection=none", "-mno-sse",
                "-Wl,-Ttext-segment=0x5a4d0000", "-o", own, own + ".c",
            },
        };
        try
        {
            using Process gcc = Process.Start(start)!;
            string errors = gcc.StandardError.ReadToEnd();
            gcc.WaitForExit();
            if (gcc.ExitCode != 0)
                throw new IOException("gcc could not build the oracle's helper: " + errors);
            File.Move(own, program, overwrite: true);
        }
        catch (System.ComponentModel.Win32Exception)
        {
            throw new IOException("there is no gcc to build the oracle's helper with (apt-get install gcc libc6-dev)");
        }
        finally
        {
            File.Delete(own + ".c");
        }
        return program;
    }

    private Process Start()
    {
        ProcessStartInfo start = new(_program)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            ArgumentList = { $"/proc/{Environment.ProcessId}/fd/{_area.Fd}" },
        };
        return Process.Start(start)!;
    }

    private void Stop()
    {
        if (!_process.HasExited)
            _process.Kill();
        _process.WaitForExit();
        _process.Dispose();
    }
}

/// <summary>The helper process died or hung; it was started again.</summary>
internal sealed class HelperFailedException(int record, string message) : Exception(message)
{
    /// <summary>The record it was at.</summary>
    public int Record { get; } = record;
}
