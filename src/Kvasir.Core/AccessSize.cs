namespace Kvasir.Core;

/// <summary>How wide one bus access is, in bytes.</summary>
public enum AccessSize : byte
{
    Byte = 1,
    Word = 2,
    Dword = 4,
    Qword = 8,
}
