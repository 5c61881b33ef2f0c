namespace Kvasir.Linux;

/// <summary>File requests in their order, linked through themselves. Whoever touches one holds the lock that it belongs to.</summary>
internal struct FileQueue
{
    private FileOperation? _head;
    private FileOperation? _tail;

    public readonly bool IsEmpty => _head is null;

    public void Add(FileOperation operation)
    {
        operation.Next = null;
        if (_tail is null)
            _head = operation;
        else
            _tail.Next = operation;
        _tail = operation;
    }

    /// <summary>The first request, which is in no queue then; null: there is none.</summary>
    public FileOperation? Take()
    {
        FileOperation? first = _head;
        if (first is null)
            return null;
        _head = first.Next;
        if (_head is null)
            _tail = null;
        first.Next = null;
        return first;
    }
}
