using System;
using System.IO;
using System.Threading.Tasks;

namespace Kvasir.Img;

internal static class Program
{
    public static async Task<int> Main(string[] args)
    {
        using StreamWriter output = new(Console.OpenStandardOutput()) { AutoFlush = false };
        using StreamWriter error = new(Console.OpenStandardError()) { AutoFlush = true };
        string program = Path.GetFileName(Environment.ProcessPath ?? "kvasir");
        int result;
        if (program == "qemu-io" || (args.Length > 0 && args[0] == "io"))
            result = await new IoTool(program == "qemu-io" ? program : "kvasir io", Console.In, output, error).RunAsync(program == "qemu-io" ? args : args[1..]).ConfigureAwait(false);
        else
            result = await new ImgTool(program == "qemu-img" ? program : "kvasir img", output, error, Console.IsOutputRedirected).RunAsync(args.Length > 0 && args[0] == "img" ? args[1..] : args).ConfigureAwait(false);
        await output.FlushAsync().ConfigureAwait(false);
        return result;
    }
}
