using System;
using System.Threading;

namespace Kvasir.Linux;

/// <summary>
/// Threads for file requests that wait, where there is no ring: as many as requests wait at the same time, at most 64, and none for long
/// without work. (The runtime's pool starts threads too slowly for a deep queue to a slow disk.)
/// </summary>
internal static class FileThreads
{
    private const int Most = 64;
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(5);

    private static readonly object Gate = new();
    private static FileQueue _queue;
    private static int _threads;
    private static int _idle;

    /// <summary>Queues a request.</summary>
    public static void Queue(FileOperation operation)
    {
        bool start = false;
        lock (Gate)
        {
            _queue.Add(operation);
            if (_idle > 0)
                Monitor.Pulse(Gate);
            else if (_threads < Most)
                start = ++_threads > 0;
        }
        if (start)
            new Thread(Run) { IsBackground = true, Name = "file" }.Start();
    }

    private static void Run()
    {
        while (true)
        {
            FileOperation? operation;
            lock (Gate)
            {
                while ((operation = _queue.Take()) is null)
                {
                    _idle++;
                    bool called = Monitor.Wait(Gate, Patience);
                    _idle--;
                    if (!called && _queue.IsEmpty)
                    {
                        _threads--;
                        return;
                    }
                }
            }
            operation.Execute();
        }
    }
}
