namespace Kvasir.Machine;

/// <summary>A folder of the host that the guest sees.</summary>
/// <param name="Folder">The folder's path.</param>
/// <param name="Tag">What the guest mounts it by.</param>
public sealed record ShareConfiguration(string Folder, string Tag, bool ReadOnly);
