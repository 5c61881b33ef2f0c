namespace Kvasir.Cli.Terminal;

/// <summary>What a key on the terminal means.</summary>
internal enum KeyMeaning
{
    /// <summary>Part of an escape that is not complete yet, or one that means nothing.</summary>
    Nothing,

    /// <summary>A byte for the guest.</summary>
    Byte,
    Quit,
    Monitor,
    Help,
    Break,
}

/// <summary>Finds Ctrl-A and the key after it among the terminal's bytes.</summary>
internal struct EscapeFilter
{
    public const byte Escape = 1;

    private bool _escaped;

    /// <summary>Takes one byte.</summary>
    /// <param name="key">What came in; where the meaning is <see cref="KeyMeaning.Byte"/>, what the guest gets (Ctrl-A A stands for Ctrl-A).</param>
    public KeyMeaning Next(ref byte key)
    {
        if (!_escaped)
        {
            _escaped = key == Escape;
            return _escaped ? KeyMeaning.Nothing : KeyMeaning.Byte;
        }
        _escaped = false;
        switch (key)
        {
            case (byte)'x' or (byte)'X':
                return KeyMeaning.Quit;
            case (byte)'c' or (byte)'C':
                return KeyMeaning.Monitor;
            case (byte)'h' or (byte)'H' or (byte)'?':
                return KeyMeaning.Help;
            case (byte)'b' or (byte)'B':
                return KeyMeaning.Break;
            case Escape or (byte)'a' or (byte)'A':
                key = Escape;
                return KeyMeaning.Byte;
            default:
                return KeyMeaning.Nothing;
        }
    }
}
