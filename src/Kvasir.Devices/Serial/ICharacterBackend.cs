using System;

namespace Kvasir.Devices.Serial;

/// <summary>
/// The host side of a device that moves characters: a terminal, a file, a socket. One device is attached to it, before the first byte.
/// </summary>
/// <remarks>
/// The device calls with its own lock held, from a vCPU's thread: nothing here blocks, and a back end never calls its device
/// while it holds a lock that
/// one of these methods takes.
/// </remarks>
public interface ICharacterBackend
{
    /// <summary>Tells the back end whom to give input to. Once.</summary>
    void Attach(ICharacterDevice device);

    /// <summary>Takes bytes from the guest, as many as there is room for, in order.</summary>
    /// <returns>How many were taken. After fewer than all, <see cref="ICharacterDevice.OutputPossible"/> follows when there is
    /// room again.</returns>
    int Write(ReadOnlySpan<byte> bytes);

    /// <summary>
    /// The device, which had refused input, has room again. It is called without the device's lock: the back end may call
    /// <see cref="ICharacterDevice.Receive"/> from in here or later, from its own thread.
    /// </summary>
    void ResumeInput();
}

/// <summary>A device as its back end sees it. Any thread may call; nothing blocks.</summary>
public interface ICharacterDevice
{
    /// <summary>Offers bytes to the guest.</summary>
    /// <returns>How many were taken, in order. After fewer than all, <see cref="ICharacterBackend.ResumeInput"/> follows when
    /// there is room again.</returns>
    int Receive(ReadOnlySpan<byte> bytes);

    /// <summary>The back end, which had not taken all bytes, has room again.</summary>
    void OutputPossible();

    /// <summary>The other side sent a break condition.</summary>
    void ReceiveBreak();

    /// <summary>Somebody is, or is no longer, at the other side: the modem lines CTS, DSR and DCD. Connected at first.</summary>
    void SetConnected(bool connected);
}
