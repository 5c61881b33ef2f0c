using System;
using System.Globalization;
using Kvasir.Linux;

namespace Kvasir.Img;

/// <summary>A command that is refused before it does anything; the text goes to standard error.</summary>
public sealed class CommandRefusedException : Exception
{
    public CommandRefusedException()
    {
    }

    public CommandRefusedException(string message)
        : base(message)
    {
    }

    public CommandRefusedException(string message, Exception inner)
        : base(message, inner)
    {
    }
}

/// <summary>What commands there are.</summary>
public sealed partial class IoTool
{
    private static readonly Command[] s_commands =
    [
        new("abort", null, 0, 0, "", "simulate a program crash using abort(3)"),
        new("aio_flush", null, 0, 0, "", "completes all outstanding aio requests"),
        new("aio_read", null, 2, int.MaxValue, "[-Ciqv] [-P pattern] off len [len..]", "asynchronously reads a number of bytes"),
        new("aio_write", null, 2, int.MaxValue, "[-Cfiquz] [-P pattern] off len [len..]", "asynchronously writes a number of bytes"),
        new("alloc", "a", 1, 2, "offset [count]", "checks if offset is allocated in the file"),
        new("break", null, 2, 2, "event tag", "sets a breakpoint on event and tags the stopped request as tag"),
        new("close", "c", 0, 0, "", "close the current open file"),
        new("discard", "d", 2, int.MaxValue, "[-Cq] off len", "discards a number of bytes at a specified offset"),
        new("flush", "f", 0, 0, "", "flush all in-core file state to disk"),
        new("help", "?", 0, 1, "[command]", "help for one or all commands"),
        new("info", "i", 0, 0, "", "prints information about the current file"),
        new("length", "l", 0, 0, "", "gets the length of the current file"),
        new("map", null, 0, 0, "", "prints the allocated areas of a file"),
        new("open", "o", 1, int.MaxValue, "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]", "open the file specified by path"),
        new("quit", "q", 0, int.MaxValue, "", "exit the program"),
        new("read", "r", 2, int.MaxValue, "[-abCqv] [-P pattern [-s off] [-l len]] off len", "reads a number of bytes at a specified offset"),
        new("readv", null, 2, int.MaxValue, "[-Cqv] [-P pattern] off len [len..]", "reads a number of bytes at a specified offset"),
        new("remove_break", null, 1, 1, "tag", "remove a breakpoint by tag"),
        new("reopen", null, 0, int.MaxValue, "[(-r|-w)] [-c cache] [-o options]", "reopens an image with new options"),
        new("resume", null, 1, 1, "tag", "resumes the request tagged as tag"),
        new("sigraise", null, 1, 1, "signal", "raises a signal"),
        new("sleep", null, 1, 1, "", "waits for the given value in milliseconds"),
        new("truncate", "t", 1, 3, "[-m prealloc_mode] off", "truncates the current file at the given offset"),
        new("wait_break", null, 1, 1, "tag", "waits for the suspension of a request"),
        new("write", "w", 2, int.MaxValue, "[-bcCfnquz] [-P pattern | -s source_file] off len", "writes a number of bytes at a specified offset"),
        new("writev", null, 2, int.MaxValue, "[-Cfq] [-P pattern] off len [len..]", "writes a number of bytes at a specified offset"),
    ];

    private static string Line(string command) => Array.Find(s_commands, c => c.Name == command)!.Line;

    private void Help(string[] args)
    {
        if (args.Length > 0)
        {
            if (Array.Find(s_commands, c => c.Name == args[0] || c.Alias == args[0]) is not Command one)
                throw new UsageException($"command {args[0]} not found");
            _out.WriteLine(one.Line);
            return;
        }
        foreach (Command command in s_commands)
            _out.WriteLine(command.Line);
        _out.WriteLine("\nUse 'help commandname' for extended help.");
    }

    private static void RaiseSignal(string text)
    {
        if (!int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int number) || number is < 0 or > 64)
            throw new UsageException($"{text} is not a valid signal number");
        if (number != 0)
            ProcessIdentity.Raise(number);
    }

    /// <param name="Name">The command.</param>
    /// <param name="Alias">Its short form, if it has one.</param>
    /// <param name="Least">Fewest words after it.</param>
    /// <param name="Most">Most words after it.</param>
    /// <param name="Words">What they are.</param>
    /// <param name="Meaning">What it does.</param>
    private sealed record Command(string Name, string? Alias, int Least, int Most, string Words, string Meaning)
    {
        public string Line => $"{Name}{(Words.Length > 0 ? " " : string.Empty)}{Words} -- {Meaning}";

        public string Expects => Most == int.MaxValue ? $"at least {Least} arguments" : Least == Most ? $"{Least} arguments" : $"between {Least} and {Most} arguments";
    }
}
