using System;
using Kvasir.Linux;
using Spectre.Console;

namespace Kvasir.Cli.Guests;

/// <summary>Shows what building the guest does: a moving line on a terminal, plain lines elsewhere. Standard output stays the guest's.</summary>
internal static class GuestProgress
{
    /// <param name="name">What is built: "default guest".</param>
    /// <param name="build">Builds it, reporting steps.</param>
    public static T Show<T>(string name, Func<Action<string>, T> build)
    {
        if (!TerminalMode.IsTerminal(FileDescriptor.StandardError))
            return build(step => Console.Error.WriteLine($"{name}: {step}"));
        using Display display = new(name);
        return build(display.Report);
    }

    /// <summary>Begins with the first step: a guest that is there already costs nothing.</summary>
    private sealed class Display(string name) : IDisposable
    {
        private readonly System.Threading.ManualResetEventSlim _done = new();
        private System.Threading.Tasks.Task? _shown;
        private StatusContext? _status;

        public void Report(string step)
        {
            string text = Markup.Escape($"{name}: {step}");
            if (_shown is null)
            {
                IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Error) });
                System.Threading.Tasks.TaskCompletionSource started = new();
                _shown = System.Threading.Tasks.Task.Run(() => console.Status().Start(text, status =>
                {
                    _status = status;
                    started.SetResult();
                    _done.Wait();
                }));
                started.Task.Wait();
                return;
            }
            _status!.Status(text);
        }

        public void Dispose()
        {
            _done.Set();
            _shown?.Wait();
            _done.Dispose();
        }
    }
}
